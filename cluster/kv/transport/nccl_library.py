"""The few calls of NCCL that a link needs, through ctypes.

Communicators are opened non-blocking, so that one whose peer never comes can be aborted; a call may
then answer "in progress", and `settled` tells when it has come to an end. But NCCL starts a thread
for every transfer of such a communicator, which takes longer than many a transfer; so once both
ranks are there, transfers go over a blocking one that is split off.

From NCCL 2.29 on a rank learns where the other one's memory is mapped, where both lie within reach
of each other's copy engines, and puts bytes there by a copy as any other: no multiprocessor takes
part, and the other rank's device waits for nothing. NCCL's own puts also tell the other device,
which nobody here asks for, and go over networks, where the device's stream would wait for a peer,
for ever if it has gone: no abort ends that wait (`rma_proxy.cc`).
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

from cluster.errors import HandoffRefused

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(1 << 31)
_SYMMETRIC = 1
UNIQUE_ID_BYTES = 128


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as of NCCL 2.18; later libraries take it by its size and version."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


class NcclError(HandoffRefused):
    """NCCL refused a call, or its communicator broke."""


class LinkTooLarge(HandoffRefused):
    """An end has no memory for a link of this size; it may have for a smaller one."""


@cache
def library() -> Any:
    """libnccl, as torch brings it. Raises OSError if there is none."""
    nccl = ctypes.CDLL("libnccl.so.2")
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    return nccl


@cache
def driver() -> Any:
    """CUDA's driver, which torch has loaded; None if it is not found under its usual name."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def new_unique_id() -> bytes:
    """Names a communicator; whoever is to join it must know it. Opens NCCL's bootstrap port."""
    unique = _UniqueId()
    _check(library().ncclGetUniqueId(ctypes.byref(unique)))
    return bytes(unique.internal)


class _Bytes:
    """Device memory, as torch takes it."""

    def __init__(self, address: int | None, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


SPARE_BYTES = 512 << 20
"""Of a device's memory, that links leave to the engine."""
_taking = threading.Lock()
"""Links are made in threads of their own: what one is about to take is not free for another."""


class PeerMemory:
    """Memory on the current CUDA device that a peer can be given access to. A peer that has it
    keeps it: what it still writes after `free` ends in memory that is nobody else's.

    Raises:
        LinkTooLarge: there is not so much left beside what the engine may still need.

    Attributes:
        bytes: uint8, flat; not to be used after `free`.
    """

    def __init__(self, size: int) -> None:
        self._address = ctypes.c_void_p()
        with _taking:
            free, _ = torch.cuda.mem_get_info()
            if free < size + SPARE_BYTES:
                raise LinkTooLarge(
                    f"a link needs {size >> 20} MiB of GPU memory and {SPARE_BYTES >> 20} MiB more"
                    f" left for the engine, {free >> 20} MiB are free: lower"
                    " gpu_memory_utilization or handoff.link_bytes"
                )
            try:
                _check(library().ncclMemAlloc(ctypes.byref(self._address), ctypes.c_size_t(size)))
            except NcclError as error:
                raise LinkTooLarge(
                    f"a link gets no {size >> 20} MiB of GPU memory: {error}"
                ) from error
        self.bytes = torch.as_tensor(_Bytes(self._address.value, size), device="cuda")

    def free(self) -> None:
        """Nothing on this device may touch it any more. May take a while."""
        _check(library().ncclMemFree(self._address))


class Communicator:
    """Two ranks of one. Made for the current CUDA device, which must stay it for every call.

    Args:
        rank: 0 sends, 1 receives.
        max_ctas: thread blocks that a transfer may occupy; None: NCCL decides.
    """

    def __init__(self, unique_id: bytes, rank: int, max_ctas: int | None) -> None:
        self._comm = ctypes.c_void_p()
        self._quick = ctypes.c_void_p()
        self._offset = 0
        self._rank = rank
        self._peer = 1 - rank
        self._max_ctas = max_ctas
        config = _config(max_ctas, blocking=0)
        unique = _UniqueId.from_buffer_copy(unique_id)
        _check(
            library().ncclCommInitRankConfig(
                ctypes.byref(self._comm), 2, unique, rank, ctypes.byref(config)
            )
        )

    def split(self) -> None:
        """Begins to open the communicator for transfers, when the first one has settled; both ranks
        must. It is there when this call, too, has settled."""
        config = _config(self._max_ctas, blocking=1)
        _check(
            library().ncclCommSplit(
                self._comm, 0, self._rank, ctypes.byref(self._quick), ctypes.byref(config)
            )
        )

    def settled(self) -> bool:
        """The last call has come to an end. Raises NcclError if the communicator broke."""
        state = ctypes.c_int(_SUCCESS)
        _check(library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)))
        _check(state.value)
        if state.value == _SUCCESS and self._quick:
            _check(library().ncclCommGetAsyncError(self._quick, ctypes.byref(state)))
        _check(state.value)
        return state.value == _SUCCESS

    def expose(self, memory: PeerMemory) -> bool:
        """Lets the ranks write to each other's memory; both must, with as much memory, and wait for
        each other. False: they are not within reach of each other's copy engines."""
        if not hasattr(library(), "ncclGetPeerDevicePointer"):
            return False
        window = ctypes.c_void_p()
        size = ctypes.c_size_t(memory.bytes.numel())
        own = memory.bytes.data_ptr()
        _check(
            library().ncclCommWindowRegister(
                self._quick,
                ctypes.c_void_p(own),
                size,
                ctypes.byref(window),
                ctypes.c_int(_SYMMETRIC),
            )
        )
        there = ctypes.c_void_p()
        if window and driver():
            _check(
                library().ncclGetPeerDevicePointer(
                    window, ctypes.c_size_t(0), ctypes.c_int(self._peer), ctypes.byref(there)
                )
            )
        self._offset = (there.value or 0) - own
        return bool(there)

    def put(self, address: int, size: int, stream: int) -> None:
        """Queues the copying of `size` bytes of exposed memory to the same place of the peer's."""
        code = driver().cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(address + self._offset),
            ctypes.c_uint64(address),
            ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )
        if code:
            raise NcclError(f"the driver copies nothing to the peer: error {code}")

    def send(self, address: int, size: int, stream: int) -> None:
        """Queues the sending of `size` bytes of device memory on a CUDA stream."""
        self._transfer(library().ncclSend, address, size, stream)

    def receive(self, address: int, size: int, stream: int) -> None:
        """Queues the receiving of `size` bytes into device memory on a CUDA stream."""
        self._transfer(library().ncclRecv, address, size, stream)

    def _transfer(self, call: Any, address: int, size: int, stream: int) -> None:
        _check(
            call(
                ctypes.c_void_p(address),
                ctypes.c_size_t(size),
                ctypes.c_int(_UINT8),
                ctypes.c_int(self._peer),
                self._quick,
                ctypes.c_void_p(stream),
            )
        )

    def abort(self) -> None:
        """Ends what is under way, on the device too, also in another thread. May take a while."""
        comms, self._quick, self._comm = (
            (self._quick, self._comm),
            ctypes.c_void_p(),
            ctypes.c_void_p(),
        )
        for comm in comms:
            if comm:
                library().ncclCommAbort(comm)


def _config(max_ctas: int | None, blocking: int) -> _Config:
    return _Config(
        size=ctypes.sizeof(_Config),
        magic=0xCAFEBEEF,
        version=21800,
        blocking=blocking,
        cga_cluster_size=_UNDEFINED,
        min_ctas=_UNDEFINED,
        max_ctas=_UNDEFINED if max_ctas is None else max_ctas,
        net_name=None,
        split_share=_UNDEFINED,
    )


def _check(code: int) -> None:
    if code not in (_SUCCESS, _IN_PROGRESS):
        reason = library().ncclGetErrorString(ctypes.c_int(code)).decode(errors="replace")
        raise NcclError(f"NCCL: {reason}")
