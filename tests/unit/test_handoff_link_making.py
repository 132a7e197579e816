"""Links from prefill's side, without a device: when one is made, kept or given up, and what happens
where none can be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.transport import nccl
from cluster.kv.transport.hello import decode_hello, encode_link_reply
from cluster.kv.transport.link import MAX_LINKS, Link, LinkTerms
from cluster.kv.transport.link_slots import ALIGNMENT, MAX_SLOTS
from cluster.kv.transport.nccl import NcclTransport
from cluster.kv.transport.nccl_library import (
    UNIQUE_ID_BYTES,
    LinkTooLarge,
    NcclError,
)
from cluster.kv.transport.seam import Peer
from tests.handoff.fake_links import SIGNER, TERMS

CPU = torch.device("cpu")


class Grpc:
    """Streams that nobody answers."""

    frame_bytes = 64

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.cancelled = 0
        self.opened = 0

    async def call(self, address: str, method: str) -> Grpc:
        return self

    async def open(self, peer: Peer, handoff_id: str) -> SimpleNamespace:
        self.opened += 1
        return SimpleNamespace(transport="grpc", cancel=self.cancel)

    async def send(self, wire: bytes) -> None:
        self.said.append(wire)

    async def receive_whole(self) -> None:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled += 1


class Made:
    """An OutboundLink that is up."""

    def __init__(self, used_at: float) -> None:
        self.id, self.pushes, self.closed = 1, 0, ""
        slots = SimpleNamespace(largest=64)
        self.link = SimpleNamespace(
            broken="", used_at=used_at, device=CPU, copies=None, slots=slots, puts=True
        )

    def close(self, reason: str) -> None:
        self.closed = self.link.broken = reason


def transport(memory: int = 1 << 20, required: bool = False, block: int = 64) -> NcclTransport:
    terms = LinkTerms(CPU, 600.0, None, memory)
    cache: Any = SimpleNamespace(block_bytes=block)
    return NcclTransport(Grpc(), cache, SIGNER, TERMS, required, 0, terms)  # type: ignore[arg-type]


def peer(number: int) -> Peer:
    return Peer("host:1", f"decode-{number}", "life", 0)


async def fill(made: NcclTransport) -> list[Made]:
    """As many links as there may be, the first one unused for longest."""
    links = [Made(time.monotonic() + i) for i in range(MAX_LINKS)]
    for number, link in enumerate(links):
        task: Any = asyncio.get_running_loop().create_future()
        task.set_result(link)
        made._links[peer(number)] = task
    return links


async def test_as_many_links_as_there_may_be_stay_in_use() -> None:
    pool = transport()
    links = await fill(pool)
    for number in range(MAX_LINKS):
        push = await pool.open(peer(number), "a" * 32)
        assert push.transport == "nccl"
        push.cancel()
        push.cancel()
    assert not any(link.closed or link.pushes for link in links)


async def test_a_push_for_which_the_device_has_no_memory_leaves_no_stream_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = transport()
    links = await fill(pool)

    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(nccl, "NcclOutbound", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        await pool.open(peer(0), "a" * 32)
    grpc: Any = pool._grpc
    assert (grpc.opened, grpc.cancelled) == (1, 1) and not links[0].pushes


@pytest.mark.parametrize("required", [False, True])
async def test_a_link_makes_room_that_no_push_uses(
    required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = transport(required=required)
    links = await fill(pool)
    pushes = [await pool.open(peer(number), "a" * 32) for number in range(MAX_LINKS)]
    with pytest.raises(HandoffRefused, match="in use") if required else contextlib.nullcontext():
        assert (await pool.open(peer(99), "a" * 32)).transport == "grpc"
    assert peer(99) not in pool._links and not any(link.closed for link in links)
    pushes[3].cancel()

    async def make(peer: Peer) -> Made:
        return Made(time.monotonic())

    monkeypatch.setattr(pool, "_make", make)
    await pool.open(peer(99), "a" * 32)
    assert [i for i, link in enumerate(links) if link.closed] == [3]
    assert len(pool._links) == MAX_LINKS


@pytest.mark.parametrize("required", [False, True])
async def test_a_device_that_has_no_memory_now_is_no_reason_for_ever(
    required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool: Any = transport(required=required)

    def no_memory(*args: object) -> Link:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nccl, "Link", no_memory)
    monkeypatch.setattr(nccl, "new_unique_id", lambda: bytes(UNIQUE_ID_BYTES))
    if not required:
        assert (await pool.open(peer(0), "a" * 32)).transport == "grpc"
        await asyncio.wait(pool._links.values(), timeout=10)
        assert (await pool.open(peer(0), "a" * 32)).transport == "grpc"
    else:
        with pytest.raises(HandoffRefused, match="out of memory"):
            await pool.open(peer(0), "a" * 32)
        assert not pool._grpc.opened, "no push waits at the peer for a link"
    assert pool._grpc.cancelled == 1, "the peer waits for nobody"
    assert not pool._links and pool._failed


@pytest.mark.parametrize("required", [False, True])
async def test_a_peer_that_cannot_be_linked_is_tried_more_and_more_seldom(
    required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL keeps something of each try in vain, for ever."""
    pool: Any = transport(required=required)
    now, tries = [0.0], list[float]()
    monkeypatch.setattr(nccl, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def refused(peer: Peer) -> Made:
        tries.append(now[0])
        raise HandoffRefused("there are 16 links already")

    monkeypatch.setattr(pool, "_make", refused)
    refusal = pytest.raises(HandoffRefused, match="16 links")
    for second in range(0, 3 * 3600, 5):
        now[0] = second
        for _ in range(3):
            with refusal if required else contextlib.nullcontext():
                assert (await pool.open(peer(0), "a" * 32)).transport == "grpc"
            await asyncio.sleep(0)
    gaps = [later - before for before, later in itertools.pairwise(tries)]
    assert gaps[:4] == [5, 10, 20, 40] and set(gaps[10:]) == {3600}

    async def make(peer: Peer) -> Made:
        return Made(now[0])

    monkeypatch.setattr(pool, "_make", make)
    now[0] += 3600
    for _ in range(2):
        last = await pool.open(peer(0), "a" * 32)
        await asyncio.sleep(0)
    assert last.transport == "nccl" and not pool._failed


@pytest.mark.parametrize(
    ("failure", "sizes"),
    [
        (LinkTooLarge("a link needs more GPU memory than is free"), [1024, 512, 256, 128, 128]),
        (torch.OutOfMemoryError("CUDA out of memory"), [1024, 512, 256, 128, 128]),
        (NcclError("NCCL: remote process exited or there was a network error"), [1024] * 5),
        (HandoffRefused("there are 16 links already"), [1024] * 5),
    ],
)
async def test_every_try_without_memory_asks_for_half_as_much(
    failure: Exception, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either end may have had no room for more; for another reason less is of no use."""
    pool: Any = transport(1 << 30)
    monkeypatch.setattr(nccl, "new_unique_id", lambda: b"u" * UNIQUE_ID_BYTES)

    def no_memory(*args: object) -> Link:
        raise failure

    monkeypatch.setattr(nccl, "Link", no_memory)
    asked = []
    for _ in range(5):
        assert (await pool.open(peer(0), "a" * 32)).transport == "grpc"
        with contextlib.suppress(type(failure)):
            await pool._links[peer(0)]
        assert (await pool.open(peer(0), "a" * 32)).transport == "grpc"  # hears of it
        hello = decode_hello(pool._grpc.said[-1], SIGNER)
        asked.append(hello.slots * hello.slot_bytes >> 20)
        pool._failed[peer(0)] = replace(pool._failed[peer(0)], until=0.0)
    assert asked == sizes


class Coming:
    """A link that fails on its way up, when it is told to."""

    def __init__(self, failure: Exception) -> None:
        self._failure = failure
        self.failing = asyncio.Event()
        self.aborted = ""

    async def up(self) -> None:
        await self.failing.wait()
        raise self._failure

    def abort(self, reason: str) -> None:
        self.aborted = reason


@pytest.mark.parametrize("short", ["this end", "the peer"])
async def test_the_end_that_has_no_memory_says_so_whatever_the_other_one_sees(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the other one sees is a communicator that broke."""
    pool: Any = transport(1 << 30)
    too_large, broke = LinkTooLarge("no memory"), NcclError("NCCL: remote process exited")
    link = Coming(too_large if short == "this end" else broke)
    said: asyncio.Queue[bytes] = asyncio.Queue()
    monkeypatch.setattr(nccl, "new_unique_id", lambda: b"u" * UNIQUE_ID_BYTES)
    monkeypatch.setattr(nccl, "Link", lambda *args: link)
    monkeypatch.setattr(pool._grpc, "receive_whole", said.get)
    making = asyncio.create_task(pool._make(peer(0)))
    link.failing.set()
    await asyncio.sleep(0.01)
    if short == "the peer":
        said.put_nowait(encode_link_reply(too_large))
    with pytest.raises(LinkTooLarge, match="no memory"):
        async with asyncio.timeout(5):
            await making
    assert link.aborted and pool._grpc.cancelled == 1


@pytest.mark.parametrize(
    ("memory", "block"), [(1 << 20, 64), (16_000_007, 64), (1 << 20, 700_001), (1 << 40, 64)]
)
async def test_slots_are_such_as_a_peer_takes(
    memory: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool: Any = transport(memory, block=block)
    monkeypatch.setattr(nccl, "new_unique_id", lambda: bytes(UNIQUE_ID_BYTES))
    monkeypatch.setattr(nccl, "Link", lambda *args: pytest.fail("no device"))
    with contextlib.suppress(pytest.fail.Exception):
        await pool._make(peer(0))
    said = decode_hello(pool._grpc.said[0], SIGNER)
    assert not said.slot_bytes % ALIGNMENT and 2 <= said.slots <= MAX_SLOTS
    assert said.slot_bytes >= block
    assert said.slots * said.slot_bytes <= max(memory, 2 * said.slot_bytes)
