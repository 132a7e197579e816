"""What `pdserve profile` measures on an idle cluster, and how.

Prompts alone, uncached and behind a cached prefix, each after a rest, in rounds between which all
else is measured: a machine's speed drifts. Decodes alone, in batches whose prompts the caches hold,
over the time in which all of a batch run. Where workers share cores: decodes beside a stream of
prompts with and without handoffs, and prompts beside decodes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.calls import RouterView, cluster_view, grpc_errors
from cluster.cli.profile_requests import Requests
from cluster.cli.profile_served import (
    Served,
    busy_seconds,
    launches_of,
    samples_of,
    steps_within,
)
from cluster.errors import NotFound, Unavailable
from cluster.planner.profile import (
    DecodeSample,
    HandoffSample,
    LaunchSample,
    PathSample,
    PrefillSample,
)
from cluster.planner.profile import SharedSample as Shared
from pdserve.v1 import inference_pb2, inference_pb2_grpc

PROMPTS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 1024)
REPEATS, PROMPT_REPEATS, SHARED_REPEATS = 3, 2, 5
"""Rounds of decodes; prompts of a kind in each round; prompts beside decodes."""
DECODE_TOKENS, TOKENS_A_SEQUENCE = 48, 2
"""Of a batch's sequences: so many, and so many more for each of them, until all have begun."""
SHARED_DECODES = ((2, 128), (8, 128), (4, 1024))
SHARED_STREAMS = ((512, 1), (128, 2), (512, 2))
"""Prompts that run beside decodes: their tokens, and those of the answer; one is not handed off."""
SHARED_PROMPTS = (128, 512, 1024)
STREAMS = 2
"""That ask one prompt after another, so that there is always one to compute."""
LAUNCHED_PROMPTS, LAUNCH_STREAMS, LAUNCH_SECONDS = (64, 512), 4, 1.5
"""Of engines that plan ahead: prompts that always wait for a step, some within a CUDA graph."""


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
        self._requests = Requests(served)
        self._longest = max_prompt
        self._max_batch = max_batch
        self._shares = shared
        self._tell = tell
        self._alone: dict[int, list[float]] = defaultdict(list)
        self._max_len = 0
        self.chunk = self.graph_tokens = 0
        self.ahead = False
        self.prefill: list[PrefillSample] = []
        self.decode: list[DecodeSample] = []
        self.handoff: list[HandoffSample] = []
        self.path: list[PathSample] = []
        self.shared: list[Shared] = []
        self.launch: list[LaunchSample] = []

    async def measure(self, address: str, token: str) -> None:
        """Raises Unavailable: the cluster is at work, or gave up a request."""
        async with channel(address, token) as to:
            own = await self._check_idle(to)
        at = address if own.operator_address == own.grpc_address else own.grpc_address
        async with channel(at, token) as to:
            await self._choose(to)
            await self._requests.ask(
                to, self._requests.ids(min(64, self._longest)), 3
            )  # what first use makes
            await self._prefills(to)
            for context in (n for n in CONTEXTS if n <= self._longest):
                batches = [n for n in BATCHES if n <= self._max_batch]
                await self._decodes(to, batches, await self._warm(to, max(batches), context))
                await self._prefills(to)
            if self.ahead:
                await self._launches(to)
            if self._shares:
                await self._beside_each_other(to)
        for length, seconds in self._alone.items():
            self.prefill.append(PrefillSample(length, 0, median(seconds)))

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
        found = [m for m in reply.models if self._requests.model in ("", m.name)]
        if len(found) != 1:
            known = ", ".join(m.name for m in reply.models)
            raise NotFound(f"--served: say which of the cluster's models is meant: {known}")
        (model,) = found
        self._requests.model = model.name
        self._requests.vocab = max(2, model.vocab_size)
        self._max_len, self.chunk = model.max_model_len, model.max_step_tokens
        self.ahead, self.graph_tokens = model.plans_ahead, model.graph_tokens
        self._longest = int(min(self._longest, self._max_len - DECODE_TOKENS - 1))

    async def _prefills(self, to: grpc.aio.Channel) -> None:
        for length in (*(n for n in PROMPTS if n < self._longest), self._longest):
            self._tell(f"computing prompts of {length} tokens")
            prompts = [self._requests.ids(length) for _ in range(PROMPT_REPEATS)]
            await self._prompts(to, prompts)
            half = length // 2
            warm = [await self._requests.rested(to, ids[:half] + self._requests.ids(length - half))
                    for ids in prompts]  # fmt: skip
            for s in warm:
                if s.cached and s.prefill > 0:
                    self.prefill.append(PrefillSample(s.prompt - s.cached, s.cached, s.prefill))

    async def _prompts(self, to: grpc.aio.Channel, prompts: Sequence[list[int]]) -> list[Served]:
        """One after another, alone; no cache holds any of them."""
        served = [await self._requests.rested(to, ids) for ids in prompts]
        for s in (s for s in served if not s.cached and s.prefill > 0):
            self._alone[s.prompt].append(s.prefill)
            if s.path.seconds > 0:
                self.path.append(s.path)
            if s.handoff is not None and (not self.chunk or s.prompt <= self.chunk):
                self.handoff.append(s.handoff)  # longer ones leave while they are computed
        return served

    async def _launches(self, to: grpc.aio.Channel) -> None:
        for length in (n for n in LAUNCHED_PROMPTS if n <= self._longest):
            self._tell(f"computing prompts of {length} tokens without a pause")
            async with self._requests.stream(to, LAUNCH_STREAMS, length, 2) as served:
                await asyncio.sleep(LAUNCH_SECONDS)
            self.launch += launches_of(served)

    async def _warm(self, to: grpc.aio.Channel, count: int, context: int) -> list[list[int]]:
        """Prompts that the caches hold, so that a batch of them begins nearly at once."""
        self._tell(f"computing {count} prompts of {context} tokens")
        prompts = [self._requests.ids(context) for _ in range(count)]
        await asyncio.gather(*(self._requests.ask(to, ids, 2) for ids in prompts))
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
            batch = await asyncio.gather(*(self._requests.ask(to, ids, output) for ids in prompts))
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
        prompts = {n: [self._requests.ids(n) for _ in range(SHARED_REPEATS)] for n in lengths}
        alone = {n: await self._prompts(to, prompts[n]) for n in lengths}
        context = min(CONTEXTS[0], self._longest)
        output = self._max_len - context - 1
        async with self._requests.stream(to, STREAMS, context, output):
            for length in lengths:
                self._tell(f"computing prompts of {length} tokens beside decodes")
                for _ in range(SHARED_REPEATS):
                    beside = await self._requests.rested(to, self._requests.ids(length))
                    for step, of in (("prefill", _prefill), ("dispatch", _dispatch)):
                        before, seconds = median(map(of, alone[length])), of(beside)
                        if before > 0 and seconds > 0:
                            self.shared.append(Shared(step, before, seconds, seconds))

    async def _decodes_beside_prompts(self, to: grpc.aio.Channel, batch: int, context: int) -> None:
        prompts = await self._warm(to, batch, context)
        quiet = steps_within(await self._batch(to, prompts))
        for prompt, output in SHARED_STREAMS:
            self._tell(f"decoding {batch} sequences beside prompts of {prompt} tokens")
            async with self._requests.stream(
                to, STREAMS, min(prompt, self._longest), output
            ) as others:
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


def _prefill(served: Served) -> float:
    return served.prefill


def _dispatch(served: Served) -> float:
    """A prompt's ways, outside of its steps."""
    return served.path.before
