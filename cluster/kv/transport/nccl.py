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

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Terms
from cluster.kv.paged import PagedCache
from cluster.kv.transport.grpc import GrpcTransport
from cluster.kv.transport.hello import Hello, decode_link_reply, encode_hello
from cluster.kv.transport.inbound_links import InboundLinks
from cluster.kv.transport.link import MAX_LINKS, Link, LinkTerms
from cluster.kv.transport.linked_inbound import LinkedInbound
from cluster.kv.transport.nccl_library import library, new_unique_id
from cluster.kv.transport.outbound_links import NcclOutbound, OutboundLink
from cluster.kv.transport.seam import Outbound, Peer, Serve
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream
from cluster.ticket import TicketSigner

log = logging.getLogger(__name__)

SLOT_BYTES = 64 << 20
"""Larger payloads take less of the engines' Python, smaller ones less memory."""
RETRY_SECONDS = 60.0
"""A peer that could not be linked is tried again so long after."""
IDLE_SECONDS = 600.0


def nccl_available(cache: PagedCache) -> str:
    """Why this rank cannot use NCCL; empty if it can."""
    if cache.device.type != "cuda":
        return f"the KV cache is on {cache.device.type}"
    try:
        library()
    except OSError as error:
        return f"libnccl cannot be loaded: {error}"
    return ""


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
        self.frame_bytes = max(min(SLOT_BYTES, links.memory_bytes // 2), cache.block_bytes)
        self._links: dict[Peer, asyncio.Task[OutboundLink]] = {}
        self._failed: dict[Peer, float] = {}

    async def start(self, serve: Serve) -> str:
        self._inbound = InboundLinks(self._signer, self._terms, self._link_terms)

        async def push(stream: Stream) -> None:
            await serve(LinkedInbound(self._grpc.inbound(stream), self._inbound))

        return self._grpc.listen({"Push": push, "Link": self._inbound.serve})

    async def open(self, peer: Peer, handoff_id: str) -> Outbound:
        inner = await self._grpc.open(peer, handoff_id)
        link = await self._link_to(peer)
        if link is None:
            return inner
        return NcclOutbound(inner, link, handoff_id, self._checksums)

    async def _link_to(self, peer: Peer) -> OutboundLink | None:
        """The link; None while there is none and gRPC will do. Raises HandoffRefused if not."""
        self._drop_dead()
        task = self._links.get(peer)
        if task is None:
            if not self._required and time.monotonic() < self._failed.get(peer, 0.0):
                return None
            task = self._links[peer] = asyncio.create_task(self._make(peer))
        if not self._required and not task.done():
            return None
        try:
            return await asyncio.shield(task)
        except HandoffRefused as refusal:
            self._links.pop(peer, None)
            self._failed[peer] = time.monotonic() + RETRY_SECONDS
            if self._required:
                raise
            log.warning("%s is reached over gRPC: %s", peer.worker_id, refusal)
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
            max(2, self._link_terms.memory_bytes // self.frame_bytes),
            self.frame_bytes,
        )
        stream = await self._grpc.call(peer.address, "Link")
        try:
            async with asyncio.timeout(self._link_terms.stuck_seconds):
                await stream.send(encode_hello(hello, self._signer))
                link = Link(hello.unique_id, 0, self._link_terms, hello.slots, hello.slot_bytes)
                up = asyncio.create_task(link.up())  # the peer answers once it is
                try:
                    wire = await stream.receive_whole()
                    refused = "closed" if wire is None else decode_link_reply(wire)[0]
                    if refused:
                        raise HandoffRefused(f"the peer refused the link: {refused}")
                    await up
                except BaseException:
                    up.cancel()
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

    def _drop_dead(self) -> None:
        """Forgets links that broke; closes idle ones, and the longest unused of too many."""
        up = {}
        for peer, task in list(self._links.items()):
            if not task.done() or task.cancelled() or task.exception() is not None:
                continue
            made = task.result()
            if not made.link.broken and made.link.used_at > time.monotonic() - IDLE_SECONDS:
                up[peer] = made
                continue
            made.close("idle")
            del self._links[peer]
        while len(up) >= MAX_LINKS:
            peer = min(up, key=lambda p: up[p].link.used_at)
            up.pop(peer).close("too many links")
            del self._links[peer]

    async def stop(self) -> None:
        for task in self._links.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close("the worker stops")
            else:
                task.cancel()
        self._inbound.close()
        await self._grpc.stop()
