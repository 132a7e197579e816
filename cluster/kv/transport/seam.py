"""The seam between a handoff and the way its bytes travel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from cluster.kv.transport.frames import Frame, Reply


class Outbound(Protocol):
    """Prefill's end of one push."""

    async def send(self, frame: Frame) -> None:
        """Waits while the peer takes no more. Raises HandoffRefused if the peer is gone."""
        ...

    async def receive(self) -> Reply:
        """Raises HandoffRefused if the peer is gone."""
        ...

    def cancel(self) -> None:
        """Ends the push at once; harmless if it has ended."""
        ...


class Inbound(Protocol):
    """Decode's end of one push."""

    async def receive(self) -> Frame | None:
        """The next frame; None when the peer has ended the push, in whatever way."""
        ...

    async def send(self, reply: Reply) -> None: ...


Serve = Callable[[Inbound], Awaitable[None]]


class Transport(Protocol):
    """Opens pushes to peers and serves those of others."""

    name: str

    async def start(self, serve: Serve) -> str:
        """Listens; returns the host:port that peers reach it at."""
        ...

    async def open(self, address: str) -> Outbound: ...

    async def stop(self) -> None: ...
