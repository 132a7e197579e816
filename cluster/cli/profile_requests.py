"""The requests of a profile: one at a time, or streams of them beside others."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from cluster.cli.calls import grpc_errors
from cluster.cli.profile_served import Served
from cluster.errors import Unavailable
from cluster.planner.profile import HandoffSample, PathSample
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

CALL_SECONDS = 120.0
REST_SECONDS = 0.06
"""Before a prompt: in a load few follow another at once, and cores that have rested are slower."""


class Requests:
    """Makes them up and sends them.

    Attributes:
        model, vocab: whom they are for, and how many tokens it knows.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.vocab = 2
        self._rng = random.Random()

    @asynccontextmanager
    async def stream(
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
                    served.append(await self.ask(to, self.ids(prompt), output, first_token))
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

    async def rested(self, to: grpc.aio.Channel, ids: list[int]) -> Served:
        """A prompt that is handed off, some time after whatever was before it."""
        await asyncio.sleep(REST_SECONDS)
        return await self.ask(to, ids, 2)

    def ids(self, count: int) -> list[int]:
        return [self._rng.randrange(1, self.vocab) for _ in range(count)]

    async def ask(
        self,
        to: grpc.aio.Channel,
        ids: list[int],
        output: int,
        first_token: asyncio.Event | None = None,
    ) -> Served:
        request = inference_pb2.GenerateRequest(
            model=self.model,
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
            report.prefill_worker,
            phases.prefill_queue_seconds,
        )
