"""h2's side of a connection, where its own ways do not fit long calls."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from cluster.rpc.limits import Limits

HEADER_TABLE_BYTES = 4096
"""HTTP/2's default. A client may ask for more; what refusals quote of it would be kept there."""

FEW_STREAMS = 64
"""So many are known before it matters that some of them are closed."""


class _Connection(H2Connection):
    """Knows how many streams are open without a look at each of them whenever one more is opened,
    which with a thousand open ones is most of what a request costs."""

    _look_at = FEW_STREAMS

    def _open_streams(self, remainder: int) -> int:
        """h2 asks in order to keep within a limit, and drops closed streams as it counts. Where all
        that are known are within it, their number will do; closed ones are dropped when twice as
        many are known as were left the last time."""
        ours = remainder == int(self.config.client_side)
        settings = self.remote_settings if ours else self.local_settings
        known = len(self.streams)
        if known < min(self._look_at, settings.max_concurrent_streams):
            return known
        count = super()._open_streams(remainder)
        self._look_at = 2 * len(self.streams) + FEW_STREAMS
        return count


def server_side(limits: Limits) -> H2Connection:
    """As `_side`."""
    return _side(limits, False, {SettingCodes.MAX_CONCURRENT_STREAMS: limits.calls})


def client_side(limits: Limits) -> H2Connection:
    """As `_side`; nothing may be pushed to it."""
    return _side(limits, True, {SettingCodes.ENABLE_PUSH: 0})


def _side(limits: Limits, client: bool, more: dict[SettingCodes, int]) -> H2Connection:
    """Before the connection begins: settings that are changed later count once the peer agrees.

    A GOAWAY ends nothing that runs, nor the frames that come with it, as h2 would have it.
    """
    protocol = _Connection(
        H2Configuration(
            client_side=client,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    protocol.local_settings = Settings(
        client=client,
        initial_values={
            SettingCodes.INITIAL_WINDOW_SIZE: limits.window_bytes,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.metadata_bytes,
            **more,
        },
    )
    machine = protocol.state_machine
    is_open = ConnectionState.CLIENT_OPEN if client else ConnectionState.SERVER_OPEN
    goes_on = (is_open, ConnectionInputs.RECV_GOAWAY)
    machine._transitions = {**machine._transitions, goes_on: (None, is_open)}
    return protocol


def bound_header_table(protocol: H2Connection) -> None:
    """After the client's settings."""
    if protocol.encoder.header_table_size > HEADER_TABLE_BYTES:
        protocol.encoder.header_table_size = HEADER_TABLE_BYTES


def goaway(protocol: H2Connection, code: ErrorCodes, why: bytes) -> bytes:
    """The frame. By hand, because h2 takes a connection for closed once it has said so."""
    last = protocol.highest_inbound_stream_id
    frame = GoAwayFrame(0, last_stream_id=last, error_code=code, additional_data=why)
    return bytes(frame.serialize())
