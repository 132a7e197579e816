"""A link's memory: how much it may be, and whether the peer reaches it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.kv.transport import link as link_module
from cluster.kv.transport import nccl_library
from cluster.kv.transport.link import Link
from cluster.kv.transport.link_slots import largest_payload
from cluster.kv.transport.nccl_library import (
    SPARE_BYTES,
    Communicator,
    LinkTooLarge,
    NcclError,
    PeerMemory,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("free", [SPARE_BYTES + 63, SPARE_BYTES + 64])
def test_a_link_leaves_memory_to_the_engine(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    fake = SimpleNamespace(ncclMemAlloc=lambda address, size: taken.append(size.value) or 0)
    monkeypatch.setattr(nccl_library, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: torch.zeros(64))
    with (
        contextlib.nullcontext()
        if free == SPARE_BYTES + 64
        else pytest.raises(LinkTooLarge, match="lower gpu_memory_utilization or handoff")
    ):
        PeerMemory(64)
    assert taken == [64] * (free == SPARE_BYTES + 64)


def test_two_links_made_at_once_do_not_take_the_same_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither is let past the other between its look at what is free and its taking it."""
    taken: list[int] = []
    both_looked = threading.Barrier(2)

    def look() -> tuple[int, int]:
        free = SPARE_BYTES + 127 - sum(taken)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_looked.wait(0.1)  # in vain, if they look by turns
        return free, 1 << 40

    fake = SimpleNamespace(ncclMemAlloc=lambda address, size: taken.append(size.value) or 0)
    monkeypatch.setattr(nccl_library, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", look)
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: torch.zeros(64))
    refused: list[str] = []

    def make() -> None:
        try:
            PeerMemory(64)
        except LinkTooLarge as refusal:
            refused.append(str(refusal))

    makers = [threading.Thread(target=make) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert taken == [64] and len(refused) == 1


def test_memory_that_is_not_given_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        ncclMemAlloc=lambda address, size: 1,
        ncclGetErrorString=lambda code: b"unhandled cuda error",
    )
    monkeypatch.setattr(nccl_library, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    with pytest.raises(LinkTooLarge, match="NCCL: unhandled cuda error"):
        PeerMemory(64)


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "most"),
    [(64, 16 << 20, 128 << 20), (2, 8, 8), (3, 8, 8), (1, 8, 8), (64, 1 << 30, 1 << 30)],
)
def test_payloads_are_so_large_at_most(slots: int, slot_bytes: int, most: int) -> None:
    assert largest_payload(slots, slot_bytes) == most


class Comm:
    """A communicator that reaches the peer's memory, or is refused it."""

    def __init__(self, refused: bool) -> None:
        self._refused = refused
        self.received = 0

    def expose(self, memory: object) -> bool:
        if self._refused:
            raise NcclError("NCCL: invalid usage")
        return True

    def receive(self, *args: int) -> None:
        self.received += 1


@pytest.mark.parametrize("refused", [False, True])
def test_a_link_whose_memory_cannot_be_reached_takes_kernels(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    link: Any = Link.__new__(Link)
    memory = SimpleNamespace(bytes=torch.zeros(64, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(link_module, "PeerMemory", lambda size: memory)
    link.device, link._rank, link._shape, link.puts = CPU, 1, (1, 64), False
    link._wire = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    link._comm = comm = Comm(refused)
    link._begin()
    assert link.puts == (not refused) and comm.received == refused


@pytest.mark.parametrize(("window", "pointer"), [(0, 0), (7, 0), (7, 9)])
def test_only_a_peer_within_reach_is_put_to(
    window: int, pointer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(comm: Any, address: Any, size: Any, found: Any, flags: Any) -> int:
        found._obj.value = window
        return 0

    def reach(asked: ctypes.c_void_p, offset: Any, peer: Any, found: Any) -> int:
        assert (asked.value, peer.value) == (window, 1)
        found._obj.value = pointer
        return 0

    copied: list[list[int | None]] = []

    def copy(*args: Any) -> int:
        copied.append([arg.value for arg in args])
        return refusal

    refusal = 0
    fake = SimpleNamespace(ncclCommWindowRegister=register, ncclGetPeerDevicePointer=reach)
    driver = SimpleNamespace(cuMemcpyDtoDAsync_v2=copy)
    monkeypatch.setattr(nccl_library, "library", lambda: fake)
    monkeypatch.setattr(nccl_library, "driver", lambda: driver)
    comm: Any = Communicator.__new__(Communicator)
    comm._quick, comm._peer = ctypes.c_void_p(1), 1
    memory: Any = SimpleNamespace(bytes=torch.zeros(64, dtype=torch.uint8))
    assert comm.expose(memory) == bool(pointer)
    if pointer:
        own = memory.bytes.data_ptr()
        comm.put(own + 16, 32, 5)
        assert copied == [[pointer + 16, own + 16, 32, 5]]
        refusal = 1
        with pytest.raises(NcclError, match="error 1"):
            comm.put(own, 32, 5)
