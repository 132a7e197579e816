"""The handoff agent: one thread with an event loop inside each process of an engine that computes.

It owns the transfer port, both sides' handoffs and the ledger. The engine's thread talks to it by
posting calls, and collects what has finished from the mailbox once a step; beside the mailbox only
the blocks' generations are shared.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from cluster.kv.doorkeeper import Doorkeeper, Terms
from cluster.kv.first_token import FIRST_TOKENS
from cluster.kv.generations import Generations
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import PagedCache
from cluster.kv.receiver import Receiver
from cluster.kv.sender import Sender
from cluster.kv.transport.choose import TransportOptions, make_transport
from cluster.ticket import TicketSigner

log = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 30.0
SWEEP_SECONDS = 5.0
SWITCH_SECONDS = 0.0005
"""How long a thread of an engine worker keeps Python to itself while another wants it. The default,
5 ms, is a decode step's length: each turn of the agent's could wait so long for the engine, and the
engine for the agent."""
GRACE_SECONDS = 30.0
"""An entry whose lease ended so long ago is nobody's any more, whatever its handoff says."""


@dataclass(frozen=True)
class Pins:
    """What a rank pins now, and what it ever had to reclaim."""

    entries: list[LedgerEntry]
    leaked_blocks: int


class HandoffAgent:
    """Runs a `Sender` and a `Receiver` over one transport.

    Args:
        terms: what this rank is.
        vocab_size: first tokens are below it.

    Attributes:
        mailbox: what finished; emptied by the engine.
        generations: renewed by the engine.
        address: host:port of the transfer port, once started.
    """

    def __init__(
        self,
        cache: PagedCache,
        signer: TicketSigner,
        terms: Terms,
        vocab_size: int,
        options: TransportOptions,
    ) -> None:
        self.mailbox = Mailbox()
        self.generations = Generations(cache.num_blocks)
        self.address = ""
        self._ledger = Ledger()
        self._transport = make_transport(options, cache, signer, terms)
        self.receiver = Receiver(
            cache,
            self.generations,
            self._ledger,
            self.mailbox,
            Doorkeeper(signer, terms),
            FIRST_TOKENS,
            vocab_size,
        )
        self.sender = Sender(
            cache,
            self.generations,
            self._ledger,
            self.mailbox,
            self._transport,
            terms.geometry,
            terms.rank,
        )
        self._device = cache.device
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="handoff-agent", daemon=True)

    @property
    def frame_bytes(self) -> int:
        """The payload size that crosses best."""
        return self._transport.frame_bytes

    @property
    def transport_name(self) -> str:
        """The best way this rank can take KV."""
        return self._transport.name

    def start(self) -> None:
        """Opens the transfer port. Raises what kept it from opening."""
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            self._transport.start(self.receiver.serve), self._loop
        )
        self.address = starting.result(START_TIMEOUT_SECONDS)
        self.post(self._sweep)

    def post(self, call: Callable[[], None]) -> None:
        """Runs `call` on the agent's loop, in the order posted."""
        self._loop.call_soon_threadsafe(call)

    def pins(self) -> Pins:
        """A consistent snapshot, checked against the live handoffs.

        Raises:
            LedgerError: an entry has no handoff or a handoff no entry.
        """
        snapshot: Future[Pins] = Future()

        def look() -> None:
            try:
                self._ledger.check_integrity(self.sender.live() | self.receiver.live())
                snapshot.set_result(Pins(self._ledger.entries(), self._ledger.leaked_blocks))
            except BaseException as error:
                snapshot.set_exception(error)

        self.post(look)
        return snapshot.result(START_TIMEOUT_SECONDS)

    def _sweep(self) -> None:
        """Takes back what nobody will give back."""
        live = self.sender.live() | self.receiver.live()
        for entry in self._ledger.strays(live, time.monotonic(), GRACE_SECONDS):
            if entry.handoff_id in live:
                continue  # its engine still computes, or its writes are still under way
            self._ledger.reclaim(entry.handoff_id)
            log.error(
                "reclaimed %d blocks (%s) that handoff %s left: %s",
                entry.blocks,
                entry.reason,
                entry.handoff_id,
                "; ".join(entry.history),
            )
        self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def stop(self) -> None:
        """Closes the port and ends every push."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._transport.stop(), self._loop).result(
            START_TIMEOUT_SECONDS
        )
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self) -> None:
        if self._device.type == "cuda":
            # Nothing of this thread's is ever queued behind the engine's own work by accident.
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream(self._device, priority=-1))
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        unfinished = asyncio.all_tasks(self._loop)
        for task in unfinished:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*unfinished, return_exceptions=True))
