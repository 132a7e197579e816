"""GPU to GPU over NCCL, with control and order over gRPC.

A push opens, is granted, commits and is acknowledged on its gRPC stream as ever; its payloads cross
a link (`Link`) between the two ranks. Links are made on first use and kept; while one comes up, and
where one cannot be, `auto` sends the payloads with the frames.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

import torch

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Terms
from cluster.kv.paged import PagedCache
from cluster.kv.transport.grpc import GrpcTransport
from cluster.kv.transport.hello import Hello, decode_link_reply, encode_hello
from cluster.kv.transport.inbound_links import InboundLinks
from cluster.kv.transport.link import MAX_LINKS, Link, LinkTerms
from cluster.kv.transport.link_slots import ALIGNMENT, MAX_SLOTS, largest_payload
from cluster.kv.transport.linked_inbound import LinkedInbound
from cluster.kv.transport.nccl_library import LinkTooLarge, library, new_unique_id
from cluster.kv.transport.outbound_links import NcclOutbound, OutboundLink
from cluster.kv.transport.seam import Outbound, Peer, Serve
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream
from cluster.ticket import TicketSigner

log = logging.getLogger(__name__)

SLOT_BYTES = 16 << 20
"""Payloads take as many in a row as they need."""
FEWEST_SLOTS = 8
"""That a link is asked for, where it may have as many."""
RETRY_SECONDS = 5.0
"""A peer that could not be linked is tried again so long after, then after twice as long …"""
LONGEST_RETRY_SECONDS = 3600.0
"""… up to this: of each try in vain NCCL keeps a thread and a socket that await the peer."""
IDLE_SECONDS = 600.0
_NO_MEMORY = (LinkTooLarge, torch.OutOfMemoryError)


def nccl_available(cache: PagedCache) -> str:
    """Why this rank cannot use NCCL; empty if it can."""
    if cache.device.type != "cuda":
        return f"the KV cache is on {cache.device.type}"
    try:
        library()
    except OSError as error:
        return f"libnccl cannot be loaded: {error}"
    return ""


@dataclass(frozen=True)
class _Failure:
    """Why a peer could not be linked.

    Attributes:
        until: no try before; CLOCK_MONOTONIC seconds.
        pause: seconds from the try to then.
        too_large: how many tries an end had no memory for.
    """

    why: str
    until: float
    pause: float
    too_large: int

    @classmethod
    def after(cls, last: _Failure | None, error: Exception) -> _Failure:
        pause = RETRY_SECONDS if last is None else min(2 * last.pause, LONGEST_RETRY_SECONDS)
        too_large = isinstance(error, _NO_MEMORY) + (0 if last is None else last.too_large)
        return cls(str(error), time.monotonic() + pause, pause, too_large)


class NcclTransport:
    """Pushes over links, each over a gRPC transport's control streams.

    Args:
        grpc: the control streams, and the way for peers that cannot be linked.
        required: refuse rather than go over gRPC.
        checksums: every how many payloads of a push are checked; 0: none.
        links: what this end asks of them.
    """

    name = "nccl"

    def __init__(
        self,
        grpc: GrpcTransport,
        cache: PagedCache,
        signer: TicketSigner,
        terms: Terms,
        required: bool,
        checksums: int,
        links: LinkTerms,
    ) -> None:
        self._grpc = grpc
        self._signer = signer
        self._terms = terms
        self._required = required
        self._checksums = checksums
        self._link_terms = links
        slot_bytes = max(min(SLOT_BYTES, links.memory_bytes // 2), cache.block_bytes)
        self._slot_bytes = _aligned(slot_bytes, cache.block_bytes)
        self._slots = min(max(2, links.memory_bytes // self._slot_bytes), MAX_SLOTS)
        self.frame_bytes = largest_payload(self._slots, self._slot_bytes)
        self._links: dict[Peer, asyncio.Task[OutboundLink]] = {}
        self._failed: dict[Peer, _Failure] = {}

    async def start(self, serve: Serve) -> str:
        self._inbound = InboundLinks(self._signer, self._terms, self._link_terms)

        async def push(stream: Stream) -> None:
            await serve(LinkedInbound(self._grpc.inbound(stream), self._inbound))

        return self._grpc.listen({"Push": push, "Link": self._inbound.serve})

    async def open(self, peer: Peer, handoff_id: str) -> Outbound:
        link = await self._link_to(peer)
        inner = await self._grpc.open(peer, handoff_id)
        if link is None:
            return inner
        try:
            return NcclOutbound(inner, link, handoff_id, self._checksums)
        except BaseException:  # its device had no memory
            inner.cancel()
            raise

    async def _link_to(self, peer: Peer) -> OutboundLink | None:
        """The link; None while there is none and gRPC will do. Raises HandoffRefused if not."""
        self._drop_dead()
        task = self._links.get(peer)
        if task is None:
            failed = self._failed.get(peer)
            if failed is not None and time.monotonic() < failed.until:
                if self._required:
                    raise HandoffRefused(failed.why)
                return None
            if not self._has_room():
                if self._required:
                    raise HandoffRefused(f"{MAX_LINKS} links are in use already")
                return None
            task = self._links[peer] = asyncio.create_task(self._make(peer))
        if not self._required and not task.done():
            return None
        try:
            made = await asyncio.shield(task)
            self._failed.pop(peer, None)
            return made
        except Exception as error:  # the device's, too: it may have had no memory just then
            if self._links.get(peer) is task:  # the first that hears of it
                del self._links[peer]
                self._failed[peer] = _Failure.after(self._failed.get(peer), error)
            if self._required:
                raise HandoffRefused(str(error)) from error
            log.warning("%s is reached over gRPC: %s", peer.worker_id, error)
            return None

    async def _make(self, peer: Peer) -> OutboundLink:
        terms = self._terms
        hello = Hello(
            secrets.randbits(63) | 1,
            terms.worker_id,
            terms.incarnation,
            terms.rank,
            peer.worker_id,
            peer.incarnation,
            peer.rank,
            await asyncio.to_thread(new_unique_id),
            time.time(),
            self._slots_for(peer),
            self._slot_bytes,
        )
        stream = await self._grpc.call(peer.address, "Link")
        try:
            async with asyncio.timeout(self._link_terms.stuck_seconds):
                try:
                    await stream.send(encode_hello(hello, self._signer))
                    link = Link(hello.unique_id, 0, self._link_terms, hello.slots, hello.slot_bytes)
                except BaseException:
                    stream.cancel()
                    raise
                up = asyncio.create_task(link.up())  # the peer answers once it is
                answer = asyncio.create_task(stream.receive_whole())
                try:
                    await asyncio.wait({up, answer}, return_when=asyncio.FIRST_COMPLETED)
                    if up.done() and isinstance(up.exception(), _NO_MEMORY):
                        await up  # all that the peer will see of it is a broken communicator
                    wire = await answer
                    if wire is None:
                        raise HandoffRefused("the peer refused the link: closed")
                    decode_link_reply(wire)
                    await up
                except BaseException:
                    up.cancel()
                    answer.cancel()
                    link.abort("the link did not come up")
                    stream.cancel()
                    raise
        except TimeoutError:
            raise HandoffRefused("the link did not come up in time") from None
        except Broken as broken:
            raise HandoffRefused(f"the peer cannot be linked: {broken}") from None
        how = "puts" if link.puts else "kernels on both sides"
        log.info("linked to rank %d of %s, by %s", peer.rank, peer.worker_id, how)
        return OutboundLink(hello.link, stream, link)

    def _slots_for(self, peer: Peer) -> int:
        """Half as many with every try that either end had no memory for."""
        failed = self._failed.get(peer)
        halved = self._slots >> (failed.too_large if failed else 0)
        return max(min(self._slots, FEWEST_SLOTS), halved)

    def _up(self) -> dict[Peer, OutboundLink]:
        return {
            peer: task.result()
            for peer, task in self._links.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    def _drop_dead(self) -> None:
        """Forgets links that broke, and closes idle ones."""
        for peer, made in self._up().items():
            idle = not made.pushes and made.link.used_at < time.monotonic() - IDLE_SECONDS
            if made.link.broken or idle:
                self._close(peer, made, "idle")

    def _has_room(self) -> bool:
        """For one link more: closes the longest unused of those that no push uses."""
        if len(self._links) < MAX_LINKS:
            return True
        unused = {peer: made for peer, made in self._up().items() if not made.pushes}
        if not unused:
            return False
        peer = min(unused, key=lambda p: unused[p].link.used_at)
        self._close(peer, unused[peer], "too many links")
        return True

    def _close(self, peer: Peer, made: OutboundLink, why: str) -> None:
        made.close(why)
        del self._links[peer]

    async def stop(self) -> None:
        for task in self._links.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close("the worker stops")
            else:
                task.cancel()
        self._inbound.close()
        await self._grpc.stop()


def _aligned(size: int, least: int) -> int:
    """A multiple of the slots' alignment: below `size`, unless that were below `least`."""
    below = size // ALIGNMENT * ALIGNMENT
    return below if below >= least else below + ALIGNMENT
