"""Clients that send a load at its times, in processes of their own, and what they see."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.timeline import PHASES
from cluster.simulator.outcome import Outcome
from cluster.simulator.workload import Arrival
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

TIMEOUT_SECONDS = 120.0
LEAD_SECONDS = 0.3
SECONDS_A_PROMPT_TOKEN = 2e-6
"""It takes at most so long to draw one."""


@dataclass(frozen=True)
class Seen:
    """What became of one request; seconds, as the router reports them.

    Attributes:
        at: since the load's start: when it was due.
        late: how long after that it was sent.
        transfer, bytes, transport: of its handoff.
        came: at the client: tenths of milliseconds from its sending to the first message with
            tokens, and from each to the next.
        error: empty for a success.
    """

    at: float
    prompt: int
    output: int
    late: float
    ttft: float = math.inf
    tpot: float = math.inf
    phases: tuple[float, ...] = ()
    transfer: float = 0.0
    bytes: int = 0
    transport: str = ""
    came: tuple[int, ...] = ()
    error: str = ""

    @property
    def arrival(self) -> Arrival:
        return Arrival(self.at, self.prompt, self.output)

    @property
    def outcome(self) -> Outcome:
        return Outcome("", self.at, self.prompt, self.output, self.ttft, self.tpot,
                       error=self.error)  # fmt: skip


class Clients:
    """So many processes; close it."""

    def __init__(self, count: int, address: str, model: str, vocab: int) -> None:
        self._count = count
        self._to = (address, model, vocab)
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        list(self._pool.map(_nothing, range(count)))  # what it imports

    def measure(self, arrivals: Sequence[Arrival]) -> list[Seen]:
        """Sends them at their times; no two requests share a prompt."""
        parts = [arrivals[i :: self._count] for i in range(self._count)]
        tokens = max(sum(a.prompt for a in part) for part in parts)
        begins = time.monotonic() + LEAD_SECONDS + SECONDS_A_PROMPT_TOKEN * tokens
        sent = [self._pool.submit(_send, *self._to, part, begins) for part in parts]
        return sorted((seen for part in sent for seen in part.result()), key=lambda s: s.at)

    def close(self) -> None:
        self._pool.shutdown()


def _nothing(_: int) -> None:
    time.sleep(0.05)


def _send(
    address: str, model: str, vocab: int, arrivals: Sequence[Arrival], begins: float
) -> list[Seen]:
    rng, ids = random.Random(), range(1, vocab)
    requests = [
        inference_pb2.GenerateRequest(
            model=model,
            token_ids=inference_pb2.TokenIds(ids=rng.choices(ids, k=arrival.prompt)),
            sampling=common_pb2.SamplingParams(
                temperature=0, max_tokens=arrival.output, ignore_eos=True
            ),
        )
        for arrival in arrivals
    ]

    async def all_of_them() -> list[Seen]:
        async with channel(address) as to:
            stub = inference_pb2_grpc.InferenceStub(to)
            return await asyncio.gather(
                *(_one(stub, *pair, begins) for pair in zip(requests, arrivals, strict=True))
            )

    return asyncio.run(all_of_them())


async def _one(stub: Any, request: Any, arrival: Arrival, begins: float) -> Seen:
    due = begins + arrival.at
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    sent = time.monotonic()
    asked = (arrival.at, arrival.prompt, arrival.output, sent - due)
    stamps, completed = [sent], None
    try:
        async for message in stub.Generate(request, timeout=TIMEOUT_SECONDS):
            if message.HasField("completed"):
                completed = message.completed
            elif message.delta.token_ids:
                stamps.append(time.monotonic())
    except grpc.aio.AioRpcError as error:
        return Seen(*asked, error=error.details() or error.code().name)
    if completed is None:
        return Seen(*asked, error="the stream ended without its last message")
    (report,) = completed.completions
    return Seen(
        *asked,
        report.ttft_seconds,
        report.tpot_seconds,
        tuple(round(getattr(report.phases, f"{name}_seconds"), 6) for name in PHASES),
        round(report.handoff.transfer_seconds, 6),
        report.handoff.bytes,
        report.handoff.transport,
        tuple(round((b - a) * 1e4) for a, b in pairwise(stamps)),
    )
