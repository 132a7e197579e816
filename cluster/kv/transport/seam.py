"""The seam between a handoff and the way its bytes travel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence
from cluster.kv.transport.checksums import Tally
from cluster.kv.transport.frames import Abort, Blocks, Coming, Commit, Frame, Open, Reply


@dataclass(frozen=True)
class Peer:
    """One rank of one life of a decode worker."""

    address: str
    worker_id: str
    incarnation: str
    rank: int


class Buffer(Protocol):
    """Memory for the payload of one frame, to be filled and sent.

    Attributes:
        payload: uint8, flat; on the host, or on the cache's device.
    """

    payload: torch.Tensor


class Outbound(Protocol):
    """Prefill's end of one push.

    Attributes:
        transport: how its payloads cross.
        link: names the link they cross; 0 if they come with the frames.
        frame_bytes: the payload size that crosses best.
        bursts: payloads cross best several at once, with pauses between.
        stream: the device's stream on which buffers are to be filled; None: the cache's own.
    """

    transport: str
    link: int
    frame_bytes: int
    bursts: bool
    stream: Any

    async def buffer(self, size: int) -> Buffer:
        """Waits while too many payloads are under way."""
        ...

    def discard(self, buffer: Buffer) -> None:
        """A buffer will not be sent."""
        ...

    def tally(self, sequence: int) -> Tally | None:
        """What is to count a payload while its buffer is filled; None: nothing."""
        ...

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        """Sends a buffer as soon as `filled` is reached; may return before that."""
        ...

    async def send_pieces(self, run: BlockRun, pieces: Sequence[memoryview], seed: int) -> None:
        """Sends a payload from where it lies in host memory; never asked of a link."""
        ...

    async def reached(self, filled: Fence) -> None:
        """Waits for the device. Raises HandoffRefused if the way to the peer broke before."""
        ...

    async def flush(self) -> int:
        """Waits until every buffer has been filled; returns the checksum for the commit.

        Raises:
            HandoffRefused: one of them cannot be sent.
        """
        ...

    async def send(self, frame: Open | Commit | Abort) -> None:
        """Waits while the peer takes no more. Raises HandoffRefused if the peer is gone."""
        ...

    async def receive(self) -> Reply:
        """Raises HandoffRefused if the peer is gone."""
        ...

    def cancel(self) -> None:
        """Ends the push at once; harmless if it has ended."""
        ...


class Inbound(Protocol):
    """Decode's end of one push.

    Attributes:
        transport: how its payloads cross, known once the first frame has come.
        stream: the device's stream on which payloads may be read; None: the cache's own.
    """

    transport: str
    stream: Any

    async def receive(self) -> Frame | None:
        """The next frame; None when the peer has ended the push, in whatever way.

        Raises:
            HandoffRefused: what came is no frame.
        """
        ...

    def claim(self, handoff_id: str) -> None:
        """The push was admitted: payloads of this handoff are its own."""
        ...

    async def read(
        self,
        coming: Coming,
        pieces: Sequence[memoryview],
        allowed: Callable[[], None],
        seed: int,
    ) -> None:
        """Reads a payload to its place, and verifies it.

        Args:
            pieces: of the payload's size together.
            allowed: called in every turn of the loop in which something is written, before it is;
                what it raises ends the reading.

        Raises:
            HandoffRefused: the payload is not what was sent, or never came.
        """
        ...

    async def fetch(self, coming: Coming, seed: int) -> Blocks:
        """Reads a payload into memory of its own, and verifies it.

        Raises:
            HandoffRefused: the payload is not what was sent, or never came.
        """
        ...

    def verify(self, blocks: Blocks, seed: int) -> Tally | None:
        """Of a payload that `receive` gave whole: raises HandoffRefused if it is seen not to be
        what was sent. What a device is yet to find out is judged with the commit; what is returned
        is to count the payload while it is written."""
        ...

    async def reached(self, fence: Fence | None) -> None:
        """Waits for the device. Raises HandoffRefused if the payloads before it never came."""
        ...

    async def judge(self, commit: Commit) -> None:
        """Once every payload has landed: raises HandoffRefused unless they are what was sent."""
        ...

    def done(self, blocks: Blocks, read: bool = False) -> None:
        """The payload's memory may be used again: once what is queued on the device is done, or at
        once if it has been read."""
        ...

    async def send(self, reply: Reply) -> None: ...

    def close(self) -> None:
        """The push is over."""
        ...


Serve = Callable[[Inbound], Awaitable[None]]


class Transport(Protocol):
    """Opens pushes to peers and serves those of others.

    Attributes:
        frame_bytes: the payload size that crosses best.
    """

    name: str
    frame_bytes: int

    async def start(self, serve: Serve) -> str:
        """Listens; returns the host:port that peers reach it at."""
        ...

    async def open(self, peer: Peer, handoff_id: str) -> Outbound:
        """Begins a handoff's push. Raises HandoffRefused if the peer cannot be reached this way."""
        ...

    async def stop(self) -> None: ...
