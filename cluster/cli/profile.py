"""`pdserve profile`: a short calibration run against a running cluster, through its own API.

Alone on an idle cluster: prompts one at a time, their first two tokens, so that the handoff is part
of them, uncached and behind a cached prefix; then decodes in batches. What the workers report of
their own phases is what is kept, and apart from it what a request takes outside of them. Where
workers share a machine, prompts are measured beside decodes and decodes beside prompts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.calls import RouterView, cluster_view, grpc_errors
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.errors import InvalidRequest, NotFound, Unavailable
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import hardware
from cluster.planner.profile import (
    DecodeSample,
    HandoffSample,
    PathSample,
    PrefillSample,
    Profile,
)
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

PROMPTS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 1024)
REPEATS = 3
DECODE_TOKENS = 48
CALL_SECONDS = 120.0
BESIDE_PROMPT, BESIDE_TOKENS, BESIDE_DECODES = 512, 200, 2
"""What runs beside what is measured, where workers share a machine."""


@dataclass(frozen=True)
class Wanted:
    """The command line's options.

    Attributes:
        model, gpu, tensor_parallel: what the profile is of, as `pdserve plan` names it.
        served: as the cluster calls the model; empty: the only one.
        max_prompt, max_batch: the largest measured.
        shared: prefill and decode workers run on the same cores.
    """

    model: str
    gpu: str
    tensor_parallel: int
    served: str
    max_prompt: int
    max_batch: int
    out: Path
    shared: bool = False


@dataclass(frozen=True)
class _Served:
    """One completion, as the workers report it: seconds, tokens, bytes."""

    prefill: float
    decode: float
    prompt: int
    cached: int
    tokens: int
    decode_worker: str
    handoff: HandoffSample | None
    path: PathSample


def run(terminal: Terminal, address: str, token: str, wanted: Wanted, as_json: bool) -> int:
    """Measures, fits, and writes the profile; says how far the fit is off."""
    shape, gpu = load_shape(wanted.model), hardware(wanted.gpu)
    with terminal.err.status("measuring") as status:
        run = _Run(wanted, status.update)
        asyncio.run(run.measure(address, token))
    prefill, decode, handoff = tuple(run.prefill), tuple(run.decode), tuple(run.handoff)
    profile = Profile(
        shape.name, gpu.name, wanted.tensor_parallel, prefill, decode, handoff, tuple(run.path)
    )
    fitted = calibrate(roofline(shape, gpu, wanted.tensor_parallel), profile)
    try:
        wanted.out.write_text(profile.to_json() + "\n")
    except OSError as error:
        raise InvalidRequest("--out", f"{wanted.out} cannot be written: {error}") from error
    errors = {
        "prefill": {"median": fitted.prefill_error.median, "p90": fitted.prefill_error.p90},
        "decode": {"median": fitted.decode_error.median, "p90": fitted.decode_error.p90},
    }
    counts = {"prefill": len(prefill), "decode": len(decode), "handoff": len(handoff)}
    if as_json:
        terminal.json({"profile": str(wanted.out), "samples": counts, "errors": errors})
    else:
        spoken = ", ".join(f"{n} of {kind}" for kind, n in counts.items())
        terminal.out.print(f"{wanted.out}: samples: {spoken}", markup=False)
        for kind, off in errors.items():
            terminal.out.print(
                f"{kind}: the fit is off by {off['median']:.1%} (median), {off['p90']:.1%} "
                "(p90) where it was not told",
                markup=False,
            )
    return EXIT_OK


class _Run:
    """Fills its lists of samples."""

    def __init__(self, wanted: Wanted, tell: Callable[[str], None]) -> None:
        self._served = wanted.served
        self._max_prompt = wanted.max_prompt
        self._max_batch = wanted.max_batch
        self._shared = wanted.shared
        self._tell = tell
        self._rng = random.Random()
        self._vocab = 2
        self.prefill: list[PrefillSample] = []
        self.decode: list[DecodeSample] = []
        self.handoff: list[HandoffSample] = []
        self.path: list[PathSample] = []

    async def measure(self, address: str, token: str) -> None:
        async with channel(address, token) as to:
            own = await self._check_idle(to)
        at = address if own.operator_address == own.grpc_address else own.grpc_address
        async with channel(at, token) as to:
            longest = await self._choose(to)
            await self._ask(to, self._ids(min(64, longest)), 3)  # whatever is made on first use
            async with self._beside(to, 32, BESIDE_TOKENS, BESIDE_DECODES):
                await self._prefills(to, longest)
            async with self._beside(to, min(BESIDE_PROMPT, longest), 2, 1):
                for batch, context in self._decodes(longest):
                    await self._decode_batch(to, batch, context)

    @asynccontextmanager
    async def _beside(
        self, to: grpc.aio.Channel, prompt: int, tokens: int, streams: int
    ) -> AsyncIterator[None]:
        """Other work meanwhile, where workers share a machine.

        A stream of decodes always has one running, a stream of prompts half of the time.
        """

        async def keep_asking() -> None:
            while True:
                began = time.monotonic()
                await self._ask(to, self._ids(prompt), tokens)
                if tokens <= 2:
                    await asyncio.sleep(time.monotonic() - began)

        tasks = [asyncio.create_task(keep_asking()) for _ in range(streams if self._shared else 0)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _decode_batch(self, to: grpc.aio.Channel, batch: int, context: int) -> None:
        self._tell(f"decoding {batch} sequences of {context} tokens")
        served = await asyncio.gather(
            *(self._ask(to, self._ids(context), DECODE_TOKENS) for _ in range(batch))
        )
        self.decode += _decode_samples(served)
        if batch == 1:
            self.handoff += [s.handoff for s in served if s.handoff is not None]

    async def _check_idle(self, to: grpc.aio.Channel) -> RouterView:
        """The router that answers."""
        view = await cluster_view(to)
        if running := sum(worker.running_sequences for worker in view.workers):
            raise Unavailable(
                f"{running} sequences run on the cluster, and a profile measures it alone: wait "
                "until it is idle"
            )
        return view.routers[0]

    async def _choose(self, to: grpc.aio.Channel) -> int:
        """Finds the model; the longest prompt to measure."""
        stub = inference_pb2_grpc.InferenceStub(to)
        with grpc_errors():
            reply = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
        found = [m for m in reply.models if self._served in ("", m.name)]
        if len(found) != 1:
            known = ", ".join(m.name for m in reply.models)
            raise NotFound(f"--served: say which of the cluster's models is meant: {known}")
        model = found[0]
        self._served, self._vocab = model.name, max(2, model.vocab_size)
        return int(min(self._max_prompt, model.max_model_len - DECODE_TOKENS - 1))

    async def _prefills(self, to: grpc.aio.Channel, longest: int) -> None:
        for length in (n for n in PROMPTS if n <= longest):
            self._tell(f"computing prompts of {length} tokens")
            prompts = [self._ids(length) for _ in range(REPEATS)]
            served = [await self._ask(to, ids, 2) for ids in prompts]
            if fresh := [s.prefill for s in served if not s.cached and s.prefill > 0]:
                self.prefill.append(PrefillSample(length, 0, median(fresh)))
            self.path += [s.path for s in served if s.prefill > 0 and s.path.seconds > 0]
            half = length // 2
            warm = [await self._ask(to, ids[:half] + self._ids(length - half), 2)
                    for ids in prompts]  # fmt: skip
            for s in warm:
                if s.cached and s.prefill > 0:
                    self.prefill.append(PrefillSample(s.prompt - s.cached, s.cached, s.prefill))

    def _decodes(self, longest: int) -> Iterator[tuple[int, int]]:
        for context in CONTEXTS:
            for batch in BATCHES:
                if batch <= self._max_batch and context <= longest:
                    yield batch, context

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randrange(1, self._vocab) for _ in range(count)]

    async def _ask(self, to: grpc.aio.Channel, ids: list[int], output: int) -> _Served:
        request = inference_pb2.GenerateRequest(
            model=self._served,
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=common_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
        )
        completed = None
        with grpc_errors():
            stub = inference_pb2_grpc.InferenceStub(to)
            async for response in stub.Generate(request, timeout=CALL_SECONDS):
                if response.HasField("completed"):
                    completed = response.completed
        if completed is None:
            raise Unavailable("the router ended a stream without its last message")
        (report,) = completed.completions
        moved = report.handoff
        return _Served(
            report.phases.prefill_seconds,
            report.phases.decode_seconds,
            len(ids),
            completed.usage.cached_prompt_tokens,
            completed.usage.completion_tokens,
            report.decode_worker,
            HandoffSample(moved.bytes, moved.transfer_seconds)
            if report.HasField("handoff") and moved.bytes and moved.transfer_seconds > 0
            else None,
            PathSample(
                len(ids),
                moved.bytes if report.HasField("handoff") else 0,
                report.ttft_seconds - report.phases.prefill_seconds,
                report.phases.handoff_wait_seconds
                + report.phases.decode_queue_seconds
                + report.phases.first_step_seconds,
            ),
        )


def _decode_samples(served: list[_Served]) -> list[DecodeSample]:
    """A sample for each worker that decoded some of a batch: its own part of it."""
    by_worker: dict[str, list[_Served]] = defaultdict(list)
    for each in served:
        if each.decode > 0 and each.tokens > 2:
            by_worker[each.decode_worker].append(each)
    return [
        DecodeSample(
            len(group),
            round(sum(s.prompt + s.tokens / 2 for s in group)),
            median(s.decode / (s.tokens - 2) for s in group),
        )
        for group in by_worker.values()
    ]
