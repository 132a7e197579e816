"""The link to one life of one worker: a multiplexed stream, sequences down, tokens up.

The worker answers the Hello with its initial metadata; from then on it may be placed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.clock import Clock
from cluster.errors import Overloaded, PdserveError, Unavailable
from cluster.rpc.client import CallFailed, ClientCall, ClientConnection, connected
from cluster.rpc.limits import Limits
from cluster.store.records import WorkerRecord
from cluster.ticket import TicketSigner
from pdserve.v1 import worker_pb2
from router import worker_wire as wire
from router.events import Output, WorkerFailed
from router.fleet import Fleet
from router.output import Stage
from router.placement import Target, WorkerView
from router.share import Share
from router.worker_wire import SequenceStart

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
LIMITS = Limits(
    message_bytes=64 << 20,
    calls=0,
    window_bytes=4 << 20,
    keepalive_seconds=20.0,
    keepalive_timeout_seconds=10.0,
)
SERVICE = f"/{worker_pb2.DESCRIPTOR.services_by_name['Worker'].full_name}"

Listener = Callable[[Output | WorkerFailed], None]
log = logging.getLogger(__name__)


@dataclass(slots=True)
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
        self._connection: ClientConnection | None = None
        self._call: ClientCall | None = None

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
        self._send(wire.start_message(start))

    def cancel(self, sequence_id: str) -> None:
        """Tells the worker to drop a sequence; its listener hears no more."""
        if opened := self._open.pop(sequence_id, None):
            self._fleet.release(self._clock.now(), opened.share)
            self._send(wire.cancel_message(sequence_id))

    async def describe(self, timeout: float) -> worker_pb2.WorkerDescription:
        """What the worker holds. Raises Unavailable."""
        if self._connection is None:
            raise self._lost("is not connected")
        asked = worker_pb2.DescribeRequest().SerializeToString()
        try:
            answer = await self._connection.ask(
                f"{SERVICE}/Describe", self._metadata, asked, timeout
            )
        except CallFailed as error:
            raise self._lost(f"did not describe itself: {error.code.name}") from error
        return worker_pb2.WorkerDescription.FromString(answer)

    async def run(self) -> None:
        """Keeps the stream up until the task is cancelled, which fails its sequences."""
        backoff = MIN_BACKOFF_SECONDS
        try:
            while True:
                reason = "closed its stream"
                try:
                    await self._serve()
                except CallFailed as error:
                    reason = f"was lost: {error.code.name}"
                    log.info("worker %s: %s %s", self.record.worker_id, reason, error.details)
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

    async def _serve(self) -> None:
        record = self.record
        async with connected(record.address, LIMITS, CONNECT_TIMEOUT_SECONDS) as connection:
            self._connection = connection
            self._call = connection.open(f"{SERVICE}/Serve", self._metadata, self._hear)
            self._send(wire.hello_message(self._router_id, record.worker_id, record.incarnation))
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self._call.begun
            self._set_connected(True)
            log.info("worker %s: connected", record.worker_id)
            self._changed()
            await self._call.finished

    def _send(self, message: worker_pb2.RouterMessage) -> None:
        if self._call is not None:
            self._call.send(message.SerializeToString())

    def _hear(self, data: bytes) -> None:
        try:
            message = worker_pb2.WorkerMessage.FromString(data)
            if message.HasField("plain"):
                self._receive_plain(message.plain)
            for output in message.outputs:
                self._receive(output)
            if message.HasField("blocks"):
                self._see_blocks(message.blocks)
        except Exception:
            log.exception("worker %s: a message could not be understood", self.record.worker_id)
            if self._call is not None:
                self._call.cancel()

    def _receive_plain(self, message: worker_pb2.PlainTokens) -> None:
        for sequence_id, offset, token_ids, text in wire.plain_tokens(message):
            opened = self._open.get(sequence_id)
            if opened is None:
                continue
            if not opened.share.answered:
                self._fleet.answered(self._clock.now(), opened.share)
            _tell(opened, Output(sequence_id, opened.stage, offset, token_ids, text))

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
        was_connected = self._connected
        self._connection = self._call = None
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
