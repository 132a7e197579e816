"""The handoff agent: one thread with an event loop inside each engine worker process.

It owns the transfer port, both sides' handoffs and the ledger. The engine's thread talks to it by
posting calls, and collects what has finished from the mailbox once a step; nothing else is shared.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from cluster.kv.first_token import FIRST_TOKENS
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import PagedCache
from cluster.kv.receiver import Receiver, Terms
from cluster.kv.sender import Sender
from cluster.kv.transport.grpc import GrpcTransport
from cluster.kv.transport.seam import Transport
from cluster.ticket import TicketSigner

START_TIMEOUT_SECONDS = 30.0


class HandoffAgent:
    """Runs a `Sender` and a `Receiver` over one transport.

    Args:
        host: interface of the transfer port.
        layout: fingerprint of this rank's KV layout.

    Attributes:
        mailbox: what finished; emptied by the engine.
        address: host:port of the transfer port, once started.
    """

    def __init__(
        self,
        cache: PagedCache,
        signer: TicketSigner,
        worker_id: str,
        incarnation: str,
        layout: str,
        rank: int,
        host: str,
        max_message_bytes: int,
        max_streams: int,
        vocab_size: int,
    ) -> None:
        self.mailbox = Mailbox()
        self.address = ""
        self._ledger = Ledger()
        message_bytes = max(max_message_bytes, cache.block_bytes)
        self._transport: Transport = GrpcTransport(host, message_bytes, max_streams)
        self.receiver = Receiver(
            cache,
            self._ledger,
            self.mailbox,
            signer,
            FIRST_TOKENS,
            Terms(worker_id, incarnation, layout, rank, vocab_size),
        )
        self.sender = Sender(
            cache, self._ledger, self.mailbox, self._transport, rank, max_message_bytes
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="handoff-agent", daemon=True)

    @property
    def transport_name(self) -> str:
        return self._transport.name

    def start(self) -> None:
        """Opens the transfer port. Raises what kept it from opening."""
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            self._transport.start(self.receiver.serve), self._loop
        )
        self.address = starting.result(START_TIMEOUT_SECONDS)

    def post(self, call: Callable[[], None]) -> None:
        """Runs `call` on the agent's loop, in the order posted."""
        self._loop.call_soon_threadsafe(call)

    def ledger(self) -> list[LedgerEntry]:
        """A consistent snapshot, checked against the live handoffs.

        Raises:
            LedgerError: an entry has no handoff or a handoff no entry.
        """
        snapshot: Future[list[LedgerEntry]] = Future()

        def look() -> None:
            try:
                self._ledger.check_integrity(self.sender.live() | self.receiver.live())
                snapshot.set_result(self._ledger.entries())
            except BaseException as error:
                snapshot.set_exception(error)

        self.post(look)
        return snapshot.result(START_TIMEOUT_SECONDS)

    def stop(self) -> None:
        """Closes the port and ends every push."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._transport.stop(), self._loop).result(
            START_TIMEOUT_SECONDS
        )
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_SECONDS)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
