"""The Worker service: one stream per router, many sequences on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc

from cluster.engine.protocol import Engine
from cluster.errors import PdserveError, Unavailable, status_of
from cluster.pace import Pace
from cluster.ticket import TicketSigner
from cluster.worker.blocks import BlockReporter
from cluster.worker.outbox import Outbox
from cluster.worker.sequence import Face, Identity, SequenceStart, SequenceStep, Stage
from cluster.worker.tally import Tally
from cluster.worker.wire import sequence_start, worker_message
from pdserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

PUSH_POLL_SECONDS = 0.1


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Runs sequences on the worker's faces.

    Args:
        faces: by stage; a stage without a face is refused.
        model, role: for Describe.
    """

    def __init__(
        self,
        engine: Engine,
        faces: Mapping[Stage, Face],
        me: Identity,
        signer: TicketSigner,
        model: str,
        role: str,
    ) -> None:
        self._engine = engine
        self._faces = faces
        self._me = me
        self._signer = signer
        self._model = model
        self._role = role
        self._pace = Pace()
        self._tally = Tally()
        self._running: set[asyncio.Task[None]] = set()
        self.draining = False
        """No new sequence is taken."""

    @property
    def busy(self) -> bool:
        """Sequences run now."""
        return bool(self._running)

    def change_role(self, role: str, faces: Mapping[Stage, Face]) -> None:
        """Other stages from now on; what runs goes on to its end."""
        self._role = role
        self._faces = faces
        self.draining = False

    async def Serve(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> None:
        await self._authorize(context)
        hello = await anext(aiter(request_iterator), None)
        if hello is None or hello.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be hello")
            return
        named = (hello.hello.worker_id, hello.hello.incarnation)
        if named != (self._me.worker_id, self._me.incarnation):
            await context.abort(grpc.StatusCode.NOT_FOUND, "another worker lives here now")
            return
        await context.send_initial_metadata(())  # the hello is accepted
        outbox = Outbox(self._pace)
        sequences: dict[str, asyncio.Task[None]] = {}
        writer = asyncio.create_task(_write(outbox, context))
        reader = asyncio.create_task(self._read(request_iterator, sequences, outbox))
        blocks = BlockReporter(self._engine.held_blocks, outbox.put_blocks)
        reporter = asyncio.create_task(blocks.run())
        try:
            await asyncio.wait({writer, reader, reporter}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [writer, reader, reporter, *sequences.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self,
        messages: AsyncIterator[worker_pb2.RouterMessage],
        sequences: dict[str, asyncio.Task[None]],
        outbox: Outbox,
    ) -> None:
        async for message in messages:
            self._receive(message, sequences, outbox)

    def _receive(
        self,
        message: worker_pb2.RouterMessage,
        sequences: dict[str, asyncio.Task[None]],
        outbox: Outbox,
    ) -> None:
        match message.WhichOneof("kind"):
            case "start":
                sequence_id = message.start.sequence_id
                task = asyncio.create_task(self._run(message.start, outbox))
                sequences[sequence_id] = task
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                task.add_done_callback(lambda _: sequences.pop(sequence_id, None))
            case "cancel":
                if running := sequences.get(message.cancel.sequence_id):
                    running.cancel()

    async def _run(self, message: worker_pb2.StartSequence, outbox: Outbox) -> None:
        """One sequence; every way it ends but a cancellation is a last step."""
        try:
            start = sequence_start(message)
            with self._tally.of(start, outbox.put) as emit:
                await self._face(start).run(start, emit)
        except PdserveError as error:
            outbox.put(_failed(message.sequence_id, error))
        except Exception:
            log.exception("sequence %s broke", message.sequence_id)
            outbox.put(_failed(message.sequence_id, PdserveError("the worker failed internally")))

    def _face(self, start: SequenceStart) -> Face:
        if self.draining:
            raise Unavailable(f"worker {self._me.worker_id} is draining")
        face = self._faces.get(start.stage)
        if face is None:
            raise Unavailable(f"worker {self._me.worker_id} does not serve {start.stage}")
        return face

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Any
    ) -> worker_pb2.WorkerDescription:
        await self._authorize(context)
        try:
            holdings = await self._engine.holdings()
        except PdserveError as error:
            await context.abort(_code(error), str(error))
            raise
        return worker_pb2.WorkerDescription(
            worker_id=self._me.worker_id,
            incarnation=self._me.incarnation,
            role=self._role,
            model=self._model,
            draining=self.draining,
            running_sequences=len(self._running),
            ledger=[
                worker_pb2.LedgerEntry(
                    handoff_id=pinned.handoff_id,
                    reason=pinned.reason,
                    blocks=pinned.blocks,
                    bytes=pinned.bytes,
                    lease_left_seconds=pinned.lease_left,
                )
                for pinned in holdings.ledger
            ],
            engine_blocks_used=holdings.blocks_used,
            engine_blocks_total=holdings.blocks_total,
            resident_bytes=holdings.resident_bytes,
            waiting_sequences=max(0, len(self._running) - self._tally.begun),
            done=common_pb2.WorkDone(
                prompt_tokens=self._tally.prompt_tokens, output_tokens=self._tally.output_tokens
            ),
        )

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: Any
    ) -> worker_pb2.DrainResponse:
        await self._authorize(context)
        return worker_pb2.DrainResponse(remaining=await self.drain(request.timeout_seconds))

    async def drain(self, timeout_seconds: float) -> int:
        """Refuses new sequences; waits for the running ones and for the pushes they left behind.

        Returns:
            The sequences still running when the time is over.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_seconds
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_seconds)
        with contextlib.suppress(PdserveError):
            while (  # noqa: ASYNC110 - the ledger lives in the engine
                time.monotonic() < deadline and (await self._engine.holdings()).ledger
            ):
                await asyncio.sleep(PUSH_POLL_SECONDS)
        return len(self._running)

    async def _authorize(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if not self._signer.accepts_call_token(token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "internal calls need the token")


async def _write(outbox: Outbox, context: Any) -> None:
    while True:
        steps, blocks = await outbox.take()
        await context.write(worker_message(steps, blocks, time.monotonic()))


def _failed(sequence_id: str, error: PdserveError) -> SequenceStep:
    return SequenceStep(sequence_id, 0, [], finish_reason="error", error=error)


def _code(error: PdserveError) -> grpc.StatusCode:
    return next(c for c in grpc.StatusCode if c.value[0] == status_of(error).grpc_code)
