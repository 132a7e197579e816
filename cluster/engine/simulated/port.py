"""A simulated engine's transfer port: takes handoffs, each once, and only with a ticket for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.engine.simulated.wire import MAX_LINE_BYTES, TRANSPORT, Line
from cluster.errors import HandoffRefused
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.ticket import TicketSigner

Landed = Callable[[str, int], None]
"""Of a sequence id and its first token."""


@dataclass
class _Expected:
    """A reservation, or the wait for one."""

    sequence_id: str
    reserved: asyncio.Future[int]
    taken: bool = False


class TransferPort:
    """Decode's side of handoffs.

    Args:
        worker_id, incarnation, layout: what a ticket must name.
        bytes_per_token: of KV, for the results.
        landed: called when a handoff's KV is there.
        ended: called with every expected handoff's result.
    """

    def __init__(
        self,
        signer: TicketSigner,
        worker_id: str,
        incarnation: str,
        layout: str,
        bytes_per_token: int,
        landed: Landed,
        ended: Callable[[HandoffResult], None],
    ) -> None:
        self._signer = signer
        self._me = (worker_id, incarnation, layout)
        self._bytes_per_token = bytes_per_token
        self._landed = landed
        self._ended = ended
        self._expected: dict[str, _Expected] = {}
        self._offered = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> str:
        """Its address."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=MAX_LINE_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return f"{host}:{port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def expect(self, params: HandoffParams, sequence_id: str) -> None:
        """A request waits for this handoff."""
        reserved: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._expected[params.handoff_id] = _Expected(sequence_id, reserved)
        task = asyncio.ensure_future(self._notify())
        task.add_done_callback(lambda done: done.exception())

    def reserved(self, handoff_id: str, held_tokens: int) -> None:
        """The scheduler has the blocks for it."""
        expected = self._expected.get(handoff_id)
        if expected is not None and not expected.reserved.done():
            expected.reserved.set_result(held_tokens)

    def forget(self, handoff_id: str) -> None:
        """Nobody waits for it any more; whoever offers it is refused."""
        expected = self._expected.pop(handoff_id, None)
        if expected is not None:
            expected.reserved.cancel()

    async def _notify(self) -> None:
        async with self._offered:
            self._offered.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        try:
            await self._receive(line)
        except HandoffRefused as error:
            line.say("refused", reason=str(error))
        finally:
            with contextlib.suppress(OSError):
                await writer.drain()
            line.close()

    async def _receive(self, line: Line) -> None:
        offer = await line.hear("offer")
        ticket = self._signer.verify(str(offer.get("ticket", "")).encode(), time.time())
        if (ticket.decode_worker, ticket.decode_incarnation, ticket.layout) != self._me:
            raise HandoffRefused("the ticket is for another worker, life or KV layout")
        life = ticket.expires_at - time.time()
        handoff_id, expected = ticket.handoff_id, None
        try:
            async with asyncio.timeout(life):
                expected = await self._wait_for_request(handoff_id)
                held = await expected.reserved
                granted_at = time.monotonic()
                line.say("grant", held=held)
                commit = await line.hear("commit")
            if self._expected.get(handoff_id) is not expected:
                raise HandoffRefused("the request has gone")
            moved = ticket.num_tokens - held
            now = time.monotonic()
            self._ended(
                HandoffResult(
                    handoff_id,
                    "decode",
                    "",
                    TRANSPORT,
                    bytes=moved * self._bytes_per_token,
                    frames=1,
                    held_tokens=held,
                    granted_at=granted_at,
                    first_frame_at=granted_at,
                    last_frame_at=now,
                    ended_at=now,
                )
            )
            self._landed(expected.sequence_id, commit["token"])
            line.say("ack")
        except (
            HandoffRefused,
            TimeoutError,
            asyncio.CancelledError,
            KeyError,
            ValueError,
        ) as error:
            reason = str(error) or "the handoff's time is over"
            if expected is not None and self._expected.get(handoff_id) is expected:
                self._ended(HandoffResult(handoff_id, "decode", reason, ended_at=time.monotonic()))
            raise HandoffRefused(reason) from error

    async def _wait_for_request(self, handoff_id: str) -> _Expected:
        """Prefill may be faster with its offer than the router is with decode's start."""
        async with self._offered:
            await self._offered.wait_for(lambda: handoff_id in self._expected)
        expected = self._expected[handoff_id]
        if expected.taken:
            raise HandoffRefused("the ticket was used before")
        expected.taken = True
        return expected
