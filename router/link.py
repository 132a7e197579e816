"""The link to one life of one worker: a multiplexed stream, sequences down, tokens up.

The worker answers the Hello with its initial metadata; from then on it may be placed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import PdserveError, Unavailable
from cluster.store.records import WorkerRecord
from cluster.ticket import TicketSigner
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from router import worker_wire as wire
from router.events import Output, WorkerFailed
from router.output import Stage
from router.placement import Load
from router.worker_wire import SequenceStart

MAX_MESSAGE_BYTES = 64 << 20
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Two links in one process, of two routers in a test, must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

Listener = Callable[[Output | WorkerFailed], None]
log = logging.getLogger(__name__)


@dataclass
class _Open:
    """A sequence on the stream that has not ended."""

    start: SequenceStart
    listener: Listener

    @property
    def load(self) -> Load:
        prompt = len(self.start.prompt_token_ids)
        if self.start.stage is Stage.PREFILL:
            return Load(queued_prompt_tokens=prompt)
        return Load(0, 1, prompt + (self.start.sampling.max_tokens or 0))


class WorkerLink:
    """Connects, and again after every loss, until it is closed.

    Args:
        changed: called when it comes up or goes down.
    """

    def __init__(
        self,
        record: WorkerRecord,
        router_id: str,
        signer: TicketSigner,
        changed: Callable[[], None],
    ) -> None:
        self.record = record
        self.connected = False
        self._router_id = router_id
        self._metadata = (("authorization", f"Bearer {signer.call_token()}"),)
        self._changed = changed
        self._open: dict[str, _Open] = {}
        self._outgoing: asyncio.Queue[worker_pb2.RouterMessage] = asyncio.Queue()
        self._queued_prompt_tokens = 0
        self._running_sequences = 0
        self._reserved_tokens = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def load(self) -> Load:
        return Load(self._queued_prompt_tokens, self._running_sequences, self._reserved_tokens)

    @property
    def idle(self) -> bool:
        return not self._open

    def start(self, start: SequenceStart, listener: Listener) -> None:
        """Sends a sequence down; `listener` hears its outputs until its end or `cancel`."""
        self._open[start.sequence_id] = opened = _Open(start, listener)
        self._count(opened, 1)
        self._outgoing.put_nowait(wire.start_message(start))

    def cancel(self, sequence_id: str) -> None:
        """Tells the worker to drop a sequence; its listener hears no more."""
        if opened := self._open.pop(sequence_id, None):
            self._count(opened, -1)
            self._outgoing.put_nowait(wire.cancel_message(sequence_id))

    async def describe(self, timeout: float) -> worker_pb2.WorkerDescription:
        """What the worker holds. Raises Unavailable."""
        if self._channel is None:
            raise self._lost("is not connected")
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        try:
            description: worker_pb2.WorkerDescription = await stub.Describe(
                worker_pb2.DescribeRequest(), metadata=self._metadata, timeout=timeout
            )
            return description
        except grpc.aio.AioRpcError as error:
            raise self._lost(f"did not describe itself: {error.code().name}") from error

    async def run(self) -> None:
        """Keeps the stream up until the task is cancelled, which fails its sequences."""
        backoff = MIN_BACKOFF_SECONDS
        try:
            while True:
                reason = "closed its stream"
                try:
                    async with grpc.aio.insecure_channel(
                        self.record.address, options=CHANNEL_OPTIONS
                    ) as self._channel:
                        await self._serve(self._channel)
                except grpc.aio.AioRpcError as error:
                    reason = f"was lost: {error.code().name}"
                    log.info("worker %s: %s %s", self.record.worker_id, reason, error.details())
                except TimeoutError:
                    reason = "did not answer the hello"
                except Exception:
                    reason = "could not be understood"
                    log.exception("worker %s: its stream failed", self.record.worker_id)
                if self._down(reason):
                    backoff = MIN_BACKOFF_SECONDS
                await asyncio.sleep(backoff)
                backoff = min(MAX_BACKOFF_SECONDS, backoff * 2)
        finally:
            self._down("is gone")

    async def _serve(self, channel: grpc.aio.Channel) -> None:
        self._outgoing = asyncio.Queue()
        call = worker_pb2_grpc.WorkerStub(channel).Serve(
            self._requests(self._outgoing), metadata=self._metadata
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await call.initial_metadata()
            if call.done():
                raise await _error_of(call)
            self.connected = True
            log.info("worker %s: connected", self.record.worker_id)
            self._changed()
            async for message in call:
                for output in message.outputs:
                    self._receive(output)
        finally:
            call.cancel()

    async def _requests(
        self, outgoing: asyncio.Queue[worker_pb2.RouterMessage]
    ) -> AsyncIterator[worker_pb2.RouterMessage]:
        yield wire.hello_message(self._router_id, self.record.worker_id, self.record.incarnation)
        while True:
            yield await outgoing.get()

    def _receive(self, message: worker_pb2.SequenceOutput) -> None:
        opened = self._open.get(message.sequence_id)
        if opened is None:
            return
        event = wire.output_event(message, opened.start.stage, self.record.worker_id)
        if isinstance(event, WorkerFailed) or event.finish is not None:
            del self._open[message.sequence_id]
            self._count(opened, -1)
        _tell(opened, event)

    def _down(self, reason: str) -> bool:
        """Fails what is open; returns whether the link was up."""
        was_connected, self.connected, self._channel = self.connected, False, None
        lost, self._open = self._open, {}
        for sequence_id, opened in lost.items():
            self._count(opened, -1)
            _tell(opened, WorkerFailed(sequence_id, opened.start.stage, self._lost(reason)))
        if was_connected:
            self._changed()
        return was_connected

    def _lost(self, what: str) -> PdserveError:
        return Unavailable(f"worker {self.record.worker_id} {what}")

    def _count(self, opened: _Open, sign: int) -> None:
        load = opened.load
        self._queued_prompt_tokens += sign * load.queued_prompt_tokens
        self._running_sequences += sign * load.running_sequences
        self._reserved_tokens += sign * load.reserved_tokens


def _tell(opened: _Open, event: Output | WorkerFailed) -> None:
    try:
        opened.listener(event)
    except Exception:
        # One request's bug must not take down the stream that carries the others.
        log.exception("sequence %s: its output was not handled", event.sequence_id)


async def _error_of(call: Any) -> grpc.aio.AioRpcError:
    """What a finished call ended with."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )
