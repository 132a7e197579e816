"""A call's messages on their way out: at once if they can leave, else in their order."""

from __future__ import annotations

from typing import Protocol

from cluster.rpc.inbox import PREFIX


class Flow(Protocol):
    """h2's stream, for its flow-control window."""

    outbound_flow_control_window: int


class Wire(Protocol):
    """The connection, as `Endpoint` has it."""

    def try_message(self, stream_id: int, flow: Flow, message: bytes) -> bool: ...
    def some_data(self, stream_id: int, flow: Flow, data: bytearray) -> int: ...


class Sending:
    """One stream's.

    Attributes:
        waiting: bytes that could not leave yet.
    """

    def __init__(self, wire: Wire, stream_id: int, flow: Flow) -> None:
        self._wire, self._stream_id, self._flow = wire, stream_id, flow
        self.waiting = bytearray()

    def now(self, message: bytes) -> bool:
        """Sends a message if all of it can leave at once; else nothing is sent."""
        if self.waiting:
            return False
        return self._wire.try_message(self._stream_id, self._flow, message)

    def put(self, message: bytes) -> None:
        """Behind what waits; `pump` next."""
        self.waiting += PREFIX.pack(0, len(message)) + message

    def pump(self) -> None:
        """Sends what waits, as far as the peer and the socket take it."""
        waiting = self.waiting
        while waiting and (sent := self._wire.some_data(self._stream_id, self._flow, waiting)):
            del waiting[:sent]
