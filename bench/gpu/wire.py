"""What the session and its engine processes say to each other, over a socket pair of their own."""

from __future__ import annotations

import asyncio
import pickle
from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config import ModelConfig
from cluster.engine.protocol import EngineInfo, Holdings, Sampling
from cluster.kv.handoff import HandoffParams, HandoffResult

LENGTH_BYTES = 8


@dataclass(frozen=True)
class EngineSpec:
    """One engine process.

    Attributes:
        kind: pdserve's engine, a plain vLLM, or a vLLM with its NIXL connector.
        gpus: cards by index; one per rank. Empty: the CPU.
        gib: GPU memory it takes on each of its cards.
        transport: of pdserve's handoffs.
        max_ctas: thread blocks of a transfer over NCCL; None: it decides.
        port: of NIXL's side channel.
    """

    name: str
    kind: Literal["pdserve", "vllm", "nixl"]
    model: ModelConfig
    gpus: tuple[int, ...] = ()
    gib: float = 0.0
    transport: str = "grpc"
    max_ctas: int | None = None
    secret: bytes = b""
    threads: int = 1
    port: int = 0


@dataclass(frozen=True)
class Start:
    """Answered by `EngineInfo`, or None for a plain vLLM."""

    spec: EngineSpec


@dataclass(frozen=True)
class Generate:
    """Answered by `Generated`.

    Attributes:
        salt: of the prefix cache.
        remote: NIXL's `kv_transfer_params`.
        announce: `FirstToken` is sent, too.
    """

    name: str
    prompt: array[int]
    sampling: Sampling
    salt: str = ""
    handoff: HandoffParams | None = None
    remote: dict[str, Any] | None = None
    announce: bool = False


@dataclass(frozen=True)
class FirstToken:
    """A request with `announce` has its first token."""


@dataclass(frozen=True)
class Generated:
    """One request as its engine's front end saw it.

    Attributes:
        stamps: CLOCK_MONOTONIC seconds at which each token was there.
        gaps: with logprobs: how much likelier, in nats, the sampled token was than the other
            likeliest one, at each position; negative where it was not the likeliest.
        remote: NIXL's parameters for the decode side.
    """

    tokens: tuple[int, ...]
    stamps: tuple[float, ...]
    cached: int = 0
    gaps: tuple[float, ...] = ()
    result: HandoffResult | None = None
    remote: dict[str, Any] | None = None


@dataclass(frozen=True)
class AskHoldings:
    """Answered by `Holdings`."""


@dataclass(frozen=True)
class AskSums:
    """Of the blocks of a handoff, on pdserve's engines; answered by what `BlockSums.sums` returns,
    rank by rank."""

    handoff_id: str


@dataclass(frozen=True)
class Stop:
    """Ends the engine; answered by None."""


@dataclass(frozen=True)
class Failed:
    """Instead of an answer."""

    error: str


Command = Start | Generate | AskHoldings | AskSums | Stop
Sums = list[list[list[int]]]
Answer = EngineInfo | Generated | FirstToken | Holdings | Sums | Failed | None


@dataclass(frozen=True)
class Envelope:
    """A command or an answer to it."""

    number: int
    content: Any = field(default=None)


async def send(writer: asyncio.StreamWriter, envelope: Envelope) -> None:
    body = pickle.dumps(envelope)
    writer.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> Envelope | None:
    """None when the other end is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        envelope = pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    assert isinstance(envelope, Envelope)
    return envelope
