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
import numpy as np

from cluster.clock import Clock
from cluster.errors import Overloaded, PdserveError, Unavailable
from cluster.store.records import WorkerRecord
from cluster.ticket import TicketSigner
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from router import worker_wire as wire
from router.events import Output, WorkerFailed
from router.fleet import Fleet, Share
from router.output import Stage
from router.placement import Target, WorkerView
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

    stage: Stage
    listener: Listener
    share: Share


class WorkerLink:
    """Connects, and again after every loss, until it is closed.

    Args:
        changed: called when it comes up or goes down.
        fleet: where placement sees it, from now until the end of `run`.
    """

    def __init__(
        self,
        record: WorkerRecord,
        router_id: str,
        signer: TicketSigner,
        changed: Callable[[], None],
        fleet: Fleet,
        clock: Clock,
    ) -> None:
        self._record = record
        self._connected = False
        self._fleet = fleet
        self._clock = clock
        self._slot = fleet.join(self.view)
        self._router_id = router_id
        self._metadata = (("authorization", f"Bearer {signer.call_token()}"),)
        self._changed = changed
        self._open: dict[str, _Open] = {}
        self._outgoing: asyncio.Queue[worker_pb2.RouterMessage] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None

    @property
    def record(self) -> WorkerRecord:
        """As the registry had it last."""
        return self._record

    @property
    def connected(self) -> bool:
        """It may be placed on."""
        return self._connected

    @property
    def view(self) -> WorkerView:
        """What placement knows of it."""
        record = self._record
        return WorkerView(
            Target(record.worker_id, record.incarnation),
            record.model,
            record.role,
            record.state == "ready",
            self._connected,
            record.layout,
            record.block_size,
            record.num_blocks * record.block_size,
        )

    @property
    def ejected(self) -> bool:
        """Sequences failed on it of late, and it is left alone."""
        return self._fleet.ejected(self._slot)

    def update(self, record: WorkerRecord) -> None:
        """The registry has something new of this life."""
        self._record = record
        self._fleet.update(self._slot, self.view)

    @property
    def idle(self) -> bool:
        return not self._open

    def start(self, start: SequenceStart, listener: Listener, share: Share) -> None:
        """Sends a sequence down; `listener` hears its outputs until its end or `cancel`.

        Args:
            share: what it puts on this worker, counted until then.
        """
        self._open[start.sequence_id] = _Open(start.stage, listener, share)
        self._fleet.take(self._clock.now(), share)
        self._outgoing.put_nowait(wire.start_message(start))

    def cancel(self, sequence_id: str) -> None:
        """Tells the worker to drop a sequence; its listener hears no more."""
        if opened := self._open.pop(sequence_id, None):
            self._fleet.release(self._clock.now(), opened.share)
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
            self._fleet.leave(self._slot)

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
            self._set_connected(True)
            log.info("worker %s: connected", self.record.worker_id)
            self._changed()
            async for message in call:
                for output in message.outputs:
                    self._receive(output)
                if message.HasField("blocks"):
                    self._see_blocks(message.blocks)
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
        event = wire.output_event(message, opened.stage, self._record.worker_id)
        now = self._clock.now()
        if isinstance(event, WorkerFailed):
            if event.error.retryable and not isinstance(event.error, Overloaded):
                self._fleet.failed(now, self._slot, message.error.shared)
        elif not opened.share.answered:
            self._fleet.answered(now, opened.share)
        if isinstance(event, WorkerFailed) or event.finish is not None:
            del self._open[message.sequence_id]
            self._fleet.release(now, opened.share)
        _tell(opened, event)

    def _see_blocks(self, blocks: worker_pb2.BlockChanges) -> None:
        if blocks.reset:
            self._fleet.index.forget(self._slot)
        if blocks.removed:
            self._fleet.index.remove(self._slot, np.frombuffer(blocks.removed, "<u8"))
        if blocks.stored:
            self._fleet.index.add(self._slot, np.frombuffer(blocks.stored, "<u8"))

    def _down(self, reason: str) -> bool:
        """Fails what is open; returns whether the link was up."""
        was_connected, self._channel = self._connected, None
        self._set_connected(False)
        lost, self._open = self._open, {}
        for sequence_id, opened in lost.items():
            self._fleet.release(self._clock.now(), opened.share)
            _tell(opened, WorkerFailed(sequence_id, opened.stage, self._lost(reason)))
        if was_connected:
            self._changed()
        return was_connected

    def _lost(self, what: str) -> PdserveError:
        return Unavailable(f"worker {self.record.worker_id} {what}")

    def _set_connected(self, connected: bool) -> None:
        self._connected = connected
        self._fleet.update(self._slot, self.view)


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
