"""One transfer each way: over a socket, over bare gRPC, and as a handoff. Rates in bytes/s."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from bench.handoff.cache import BLOCK_BYTES, LAYERS, TOKENS, make_agent, make_ticket
from bench.handoff.peers import digest, wait_for_result
from bench.handoff.plain_peers import cpu_seconds
from cluster.kv.handoff import HandoffParams
from cluster.kv.sender import Arrival, Offer, Release
from cluster.kv.transport.choose import Choice
from cluster.kv.transport.streams.client import unpace

MIB = 1 << 20
WRITE_BYTES = 4 * MIB


class PeerProcess:
    """A process of a module of `bench.handoff`."""

    def __init__(self, module: str, *args: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.handoff.{module}", *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self.hear()

    def hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("the peer process ended")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def tell(self, **values: Any) -> None:
        self._process.stdin.write(json.dumps(values) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]

    def cpu(self) -> float:
        self.tell()
        return float(self.hear()["cpu"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class TcpRate:
    """One connection, writes of 4 MiB, from and into so much memory: with 4 MiB it is the same hot
    buffer again and again, with a cache's size every byte comes from memory and goes there, as in a
    handoff. Congestion control is a handoff's."""

    def __init__(self, memory: int = WRITE_BYTES) -> None:
        self._peer = PeerProcess("plain_peers", "tcp", memory)
        self._data = memoryview(random.randbytes(WRITE_BYTES) * (memory // WRITE_BYTES))
        self._at = 0

    def run(self, size: int) -> float:
        with socket.create_connection(("127.0.0.1", self._peer.ready["port"])) as connection:
            unpace(connection)
            began = time.monotonic()
            left = size
            while left:
                part = self._data[self._at : self._at + min(left, WRITE_BYTES)]
                sent = connection.send(part)
                self._at = (self._at + sent) % len(self._data)
                left -= sent
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            return size / (time.monotonic() - began)

    def stop(self) -> None:
        self._peer.stop()


@dataclass(frozen=True)
class GrpcShape:
    """How bare gRPC is used: channels, message size, HTTP/2 frame size (0: default)."""

    channels: int
    message: int
    frame: int


SHAPES = [
    GrpcShape(channels, message, frame)
    for channels in (1, 2)
    for message in (MIB, 2 * MIB, 4 * MIB)
    for frame in (0, (1 << 24) - 1)
]


class GrpcRate:
    """Messages of bytes with identity serialisers: no gather, no checksum, no scatter."""

    def __init__(self, shape: GrpcShape) -> None:
        self.shape = shape
        self._sink = PeerProcess("plain_peers", "grpc-sink", shape.frame)
        port = self._sink.ready["port"]
        self._source = PeerProcess(
            "plain_peers", "grpc-source", port, shape.channels, shape.message, shape.frame
        )

    def run(self, size: int) -> float:
        self._source.tell(size=size)
        return float(self._source.hear()["rate"])

    def stop(self) -> None:
        self._source.stop()
        self._sink.stop()


@dataclass(frozen=True)
class Transfer:
    """A handoff that is ready as a whole: nothing hides it.

    Attributes:
        seconds: from the prompt's arrival at prefill to decode's verdict.
        moving: from the grant to the last byte landed.
        cpu: seconds of both processes.
    """

    size: int
    seconds: float
    moving: float
    cpu: float
    transport: str

    @property
    def rate(self) -> float:
        return self.size / self.seconds


class HandoffRate:
    """Agent to agent: ticket, grant, gather, checksums, transfer, scatter, verdict.

    Args:
        link: MiB of device memory that a link takes; None: as configured by default.
        frame: MiB of a payload over gRPC.
        max_ctas: thread blocks of a transfer over NCCL; None: it decides.
    """

    def __init__(
        self,
        blocks: int,
        devices: tuple[str, str],
        transport: Choice,
        link: int | None = None,
        frame: int = 16,
        max_ctas: int | None = None,
    ) -> None:
        self._blocks = blocks
        self._agent, self._cache = make_agent(
            "prefill",
            blocks,
            devices[0],
            transport,
            frame << 20,
            link=link,
            max_ctas=max_ctas,
        )
        self._peer = PeerProcess(
            "peers", blocks, devices[1], transport, frame, link or "", max_ctas or ""
        )

    def run(self, size: int, compare: bool = False) -> Transfer:
        """With `compare`, the blocks of both sides are compared afterwards."""
        count = size // BLOCK_BYTES
        ticket, wire = make_ticket(count * TOKENS)
        self._peer.tell(
            ticket=wire,
            handoff_id=ticket.handoff_id,
            num_tokens=ticket.num_tokens,
            compare=compare,
        )
        self._peer.hear()  # reserved
        cpu = cpu_seconds() + self._peer_cpu
        ids = tuple(random.sample(range(self._blocks), count))
        params = HandoffParams(
            "prefill",
            ticket.handoff_id,
            wire,
            ticket.num_tokens,
            120.0,
            (self._peer.ready["address"],),
            "decode",
            "decode-life",
            ticket.decode_geometry,
        )
        offer = Offer(ticket.handoff_id, 0, ids, last=True)
        stamp = self._agent.generations.stamp(ids)
        sender = self._agent.sender

        def compute() -> None:
            sender.arrive(Arrival("r", params))
            sender.offer(offer)
            for layer in range(LAYERS):
                sender.layer_ready(layer, ((offer, stamp),))
            sender.release(Release(ticket.handoff_id, 7))

        began = time.monotonic()
        self._agent.post(compute)
        mine = wait_for_result(self._agent.mailbox, ticket.handoff_id)
        mine_cpu = cpu_seconds()
        theirs = self._peer.hear()
        if mine.error or theirs["error"]:
            raise RuntimeError(mine.error or theirs["error"])
        if compare and theirs["digest"] != digest(self._cache, ids):
            raise RuntimeError("decode's blocks are not prefill's")
        used = mine_cpu + theirs["cpu"] - cpu
        self._last_cpu = theirs["cpu"]
        seconds = theirs["ended_at"] - began
        moving = theirs["last_frame_at"] - max(mine.granted_at, theirs["granted_at"])
        return Transfer(size, seconds, moving, used, theirs["transport"])

    @property
    def _peer_cpu(self) -> float:
        return getattr(self, "_last_cpu", float(self._peer.ready["cpu"]))

    def stop(self) -> None:
        self._peer.stop()
        self._agent.stop()
