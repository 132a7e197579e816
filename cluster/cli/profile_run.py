"""What `pdserve profile` measures on an idle cluster, and how.

Prompts alone, uncached and behind a cached prefix, each after a rest; decodes alone, in batches
whose prompts the caches hold, over the time in which all of a batch run. Where workers share cores:
decodes beside a stream of prompts with and without handoffs, and prompts beside decodes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.calls import RouterView, cluster_view, grpc_errors
from cluster.cli.profile_served import Served, busy_seconds, samples_of, steps_within
from cluster.errors import NotFound, Unavailable
from cluster.planner.profile import DecodeSample, HandoffSample, PathSample, PrefillSample
from cluster.planner.profile import SharedSample as Shared
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

PROMPTS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 1024)
REPEATS, PROMPT_REPEATS = 3, 5
REST_SECONDS = 0.06
"""Before a prompt: in a load few follow another at once, and cores that have rested are slower."""
DECODE_TOKENS, TOKENS_A_SEQUENCE = 48, 2
"""Of a batch's sequences: so many, and so many more for each of them, until all have begun."""
SHARED_DECODES = ((2, 128), (8, 128), (4, 1024))
SHARED_STREAMS = ((512, 1), (128, 2), (512, 2))
"""Prompts that run beside decodes: their tokens, and those of the answer; one is not handed off."""
SHARED_PROMPTS = (128, 512, 1024)
STREAMS = 2
"""That ask one prompt after another, so that there is always one to compute."""
CALL_SECONDS = 120.0


class Run:
    """Fills its lists of samples.

    Args:
        served: the model's name; empty: the only one there is.
        max_prompt, max_batch: the largest measured.
        shared: workers share cores.

    Attributes:
        chunk: tokens that a step computes, as the router tells it; 0: it does not.
        ahead, graph_tokens: how workers plan and launch steps, as `Profile` has it.
    """

    def __init__(
        self,
        served: str,
        max_prompt: int,
        max_batch: int,
        shared: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._model = served
        self._longest = max_prompt
        self._max_batch = max_batch
        self._shares = shared
        self._tell = tell
        self._rng = random.Random()
        self._vocab = 2
        self._max_len = 0
        self.chunk = self.graph_tokens = 0
        self.ahead = False
        self.prefill: list[PrefillSample] = []
        self.decode: list[DecodeSample] = []
        self.handoff: list[HandoffSample] = []
        self.path: list[PathSample] = []
        self.shared: list[Shared] = []

    async def measure(self, address: str, token: str) -> None:
        """Raises Unavailable: the cluster is at work, or gave up a request."""
        async with channel(address, token) as to:
            own = await self._check_idle(to)
        at = address if own.operator_address == own.grpc_address else own.grpc_address
        async with channel(at, token) as to:
            await self._choose(to)
            await self._ask(to, self._ids(min(64, self._longest)), 3)  # what first use makes
            await self._prefills(to)
            for context in (n for n in CONTEXTS if n <= self._longest):
                batches = [n for n in BATCHES if n <= self._max_batch]
                await self._decodes(to, batches, await self._warm(to, max(batches), context))
            if self._shares:
                await self._beside_each_other(to)

    async def _check_idle(self, to: grpc.aio.Channel) -> RouterView:
        """The router that answers."""
        view = await cluster_view(to)
        if running := sum(worker.running_sequences for worker in view.workers):
            raise Unavailable(
                f"{running} sequences run on the cluster, and a profile measures it alone: wait "
                "until it is idle"
            )
        return view.routers[0]

    async def _choose(self, to: grpc.aio.Channel) -> None:
        """Finds the model and its limits."""
        stub = inference_pb2_grpc.InferenceStub(to)
        with grpc_errors():
            reply = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
        found = [m for m in reply.models if self._model in ("", m.name)]
        if len(found) != 1:
            known = ", ".join(m.name for m in reply.models)
            raise NotFound(f"--served: say which of the cluster's models is meant: {known}")
        (model,) = found
        self._model, self._vocab = model.name, max(2, model.vocab_size)
        self._max_len, self.chunk = model.max_model_len, model.max_step_tokens
        self.ahead, self.graph_tokens = model.plans_ahead, model.graph_tokens
        self._longest = int(min(self._longest, self._max_len - DECODE_TOKENS - 1))

    async def _prefills(self, to: grpc.aio.Channel) -> None:
        for length in (*(n for n in PROMPTS if n < self._longest), self._longest):
            self._tell(f"computing prompts of {length} tokens")
            prompts = [self._ids(length) for _ in range(PROMPT_REPEATS)]
            served = [await self._rested(to, ids) for ids in prompts]
            if fresh := [s.prefill for s in served if not s.cached and s.prefill > 0]:
                self.prefill.append(PrefillSample(length, 0, median(fresh)))
            self.path += [s.path for s in served if s.prefill > 0 and s.path.seconds > 0]
            if not self.chunk or length <= self.chunk:  # others are handed off while computed
                self.handoff += [s.handoff for s in served if s.handoff is not None]
            half = length // 2
            warm = [await self._rested(to, ids[:half] + self._ids(length - half))
                    for ids in prompts]  # fmt: skip
            for s in warm:
                if s.cached and s.prefill > 0:
                    self.prefill.append(PrefillSample(s.prompt - s.cached, s.cached, s.prefill))

    async def _warm(self, to: grpc.aio.Channel, count: int, context: int) -> list[list[int]]:
        """Prompts that the caches hold, so that a batch of them begins nearly at once."""
        self._tell(f"computing {count} prompts of {context} tokens")
        prompts = [self._ids(context) for _ in range(count)]
        await asyncio.gather(*(self._ask(to, ids, 2) for ids in prompts))
        return prompts

    async def _decodes(
        self, to: grpc.aio.Channel, batches: Sequence[int], prompts: Sequence[list[int]]
    ) -> None:
        """Each batch in every round: what disturbs one of them does not count."""
        rounds: dict[int, list[DecodeSample]] = {batch: [] for batch in batches}
        for _ in range(REPEATS):
            for batch, samples in rounds.items():
                self._tell(f"decoding {batch} sequences of {len(prompts[0])} tokens")
                samples += samples_of(await self._batch(to, prompts[:batch]))
        for samples in rounds.values():
            by_part: dict[int, list[DecodeSample]] = defaultdict(list)
            for sample in samples:
                by_part[sample.batch].append(sample)
            self.decode += [
                sorted(part, key=lambda s: s.seconds)[len(part) // 2] for part in by_part.values()
            ]

    async def _batch(self, to: grpc.aio.Channel, prompts: Sequence[list[int]]) -> list[Served]:
        """With more tokens each, and anew, where the first ones ended before the last ones ran."""
        most = self._max_len - len(prompts[0]) - 1
        output = min(DECODE_TOKENS + TOKENS_A_SEQUENCE * len(prompts), most)
        while True:
            batch = await asyncio.gather(*(self._ask(to, ids, output) for ids in prompts))
            if output == most or steps_within(batch) is not None:
                return batch
            output = min(2 * output, most)

    async def _beside_each_other(self, to: grpc.aio.Channel) -> None:
        for batch, context in SHARED_DECODES:
            if batch <= self._max_batch and context <= self._longest:
                await self._decodes_beside_prompts(to, batch, context)
        await self._prompts_beside_decodes(to)

    async def _prompts_beside_decodes(self, to: grpc.aio.Channel) -> None:
        lengths = [n for n in SHARED_PROMPTS if n <= self._longest]
        alone = {n: [await self._computed(to, n) for _ in range(PROMPT_REPEATS)] for n in lengths}
        context = min(CONTEXTS[0], self._longest)
        async with self._stream(to, STREAMS, context, self._max_len - context - 1):
            for length in lengths:
                self._tell(f"computing prompts of {length} tokens beside decodes")
                for _ in range(PROMPT_REPEATS):
                    for step, seconds in (await self._computed(to, length)).items():
                        before = median(times[step] for times in alone[length])
                        if before > 0 and seconds > 0:
                            self.shared.append(Shared(step, before, seconds, seconds))

    async def _computed(self, to: grpc.aio.Channel, length: int) -> dict[str, float]:
        served = await self._rested(to, self._ids(length))
        return {"prefill": served.prefill, "dispatch": served.path.before}

    async def _decodes_beside_prompts(self, to: grpc.aio.Channel, batch: int, context: int) -> None:
        prompts = await self._warm(to, batch, context)
        quiet = steps_within(await self._batch(to, prompts))
        for prompt, output in SHARED_STREAMS:
            self._tell(f"decoding {batch} sequences beside prompts of {prompt} tokens")
            async with self._stream(to, STREAMS, min(prompt, self._longest), output) as others:
                window = steps_within(await self._batch(to, prompts))
            if quiet is None or window is None:
                continue
            inside = [s for s in others if window.begins < s.first_token_at < window.ends]
            self.shared.append(
                Shared(
                    "decode",
                    quiet.seconds / quiet.steps * window.steps,
                    window.seconds,
                    busy_seconds([s.computing for s in others], window.begins, window.ends),
                    len(inside) if output > 1 else 0,
                )
            )

    @asynccontextmanager
    async def _stream(
        self, to: grpc.aio.Channel, streams: int, prompt: int, output: int
    ) -> AsyncIterator[list[Served]]:
        """Other requests meanwhile, from when each stream's first one has a token; those served,
        and at the end, unless they are long, those under way."""
        served: list[Served] = []
        over = asyncio.Event()
        begun = [asyncio.Event() for _ in range(streams)]

        async def keep_asking(first_token: asyncio.Event) -> None:
            try:
                while not over.is_set():
                    served.append(await self._ask(to, self._ids(prompt), output, first_token))
            finally:
                first_token.set()  # nobody waits for one that failed

        tasks = [asyncio.create_task(keep_asking(event)) for event in begun]
        try:
            await asyncio.gather(*(event.wait() for event in begun))
            yield served
        finally:
            over.set()
            for task in tasks if output > 2 else ():
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _rested(self, to: grpc.aio.Channel, ids: list[int]) -> Served:
        """A prompt that is handed off, some time after whatever was before it."""
        await asyncio.sleep(REST_SECONDS)
        return await self._ask(to, ids, 2)

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randrange(1, self._vocab) for _ in range(count)]

    async def _ask(
        self,
        to: grpc.aio.Channel,
        ids: list[int],
        output: int,
        first_token: asyncio.Event | None = None,
    ) -> Served:
        request = inference_pb2.GenerateRequest(
            model=self._model,
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=common_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
        )
        completed, sent, came, count = None, time.monotonic(), [], 0
        with grpc_errors():
            stub = inference_pb2_grpc.InferenceStub(to)
            async for response in stub.Generate(request, timeout=CALL_SECONDS):
                if response.HasField("completed"):
                    completed = response.completed
                elif response.delta.token_ids:
                    count += len(response.delta.token_ids)
                    came.append((time.monotonic(), count))
                    if first_token is not None:
                        first_token.set()
        if completed is None:
            raise Unavailable("the router ended a stream without its last message")
        (report,) = completed.completions
        moved, phases = report.handoff, report.phases
        begins = sent + phases.queue_seconds + phases.prefill_queue_seconds
        return Served(
            phases.prefill_seconds,
            len(ids),
            completed.usage.cached_prompt_tokens,
            report.decode_worker,
            HandoffSample(moved.bytes, moved.transfer_seconds)
            if report.HasField("handoff") and moved.bytes and moved.transfer_seconds > 0
            else None,
            PathSample(
                len(ids),
                moved.bytes if report.HasField("handoff") else 0,
                report.ttft_seconds - phases.prefill_seconds,
                phases.handoff_wait_seconds
                + phases.decode_queue_seconds
                + phases.first_step_seconds,
            ),
            (begins, begins + phases.prefill_seconds),
            tuple(came),
        )
