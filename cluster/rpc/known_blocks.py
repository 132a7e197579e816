"""Header blocks that came before on a connection: a client that calls the same method again says so
in the same bytes, places in HPACK's table, and to read them anew is most of what a call's headers
cost.

The same bytes mean the same as long as the table is as it was (RFC 7541, 2.2). So what h2 has read
and found right is kept until the table changes, and a stream that begins with it is opened here, as
h2 opens it. Everything else is h2's.
"""

from __future__ import annotations

from h2.connection import AllowedStreamIDs, ConnectionState, H2Connection
from h2.stream import H2Stream, StreamInputs

from cluster.rpc.opening import Opening

MAX_BLOCKS, MAX_BLOCK_BYTES = 16, 1024
"""That are kept for a connection."""


class KnownBlocks:
    """One connection's, at a server's end."""

    def __init__(self) -> None:
        self._known: dict[bytes, Opening] = {}
        self._newest: object = None
        self._entries = 0
        self._reading = (0, b"")

    def open(self, protocol: H2Connection, stream_id: int, block: bytes) -> Opening | None:
        """Opens a stream whose headers are `block`, all of them; None, and nothing has happened,
        where h2 is to do it: it reads the block next."""
        self._forget_if_changed(protocol)
        asked = self._known.get(block)
        if asked is None:
            self._reading = (stream_id, block)
            return None
        if (
            protocol.state_machine.state is not ConnectionState.SERVER_OPEN
            or stream_id % 2 == 0
            or stream_id <= protocol.highest_inbound_stream_id
            or protocol.open_inbound_streams >= protocol.local_settings.max_concurrent_streams
        ):
            return None
        stream = protocol._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
        stream.state_machine.process_input(StreamInputs.RECV_HEADERS)
        return asked

    def learn(self, protocol: H2Connection, stream: H2Stream, asked: Opening) -> None:
        """h2 has opened `stream`, and its headers ask for that."""
        reading, block = self._reading
        self._reading = (0, b"")
        if (
            stream.stream_id == reading
            and not self._forget_if_changed(protocol)
            and stream._expected_content_length is None
            and len(block) <= MAX_BLOCK_BYTES
            and len(self._known) < MAX_BLOCKS
        ):
            self._known[block] = asked

    def _forget_if_changed(self, protocol: H2Connection) -> bool:
        """Whether the table has changed since the last time. Each entry is an object of its
        own; the oldest ones go."""
        entries = protocol.decoder.header_table.dynamic_entries
        newest, count = entries[0] if entries else None, len(entries)
        if newest is self._newest and count == self._entries:
            return False
        self._newest, self._entries = newest, count
        self._known.clear()
        return True
