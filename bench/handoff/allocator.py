"""Keeps the memory of large messages with the process."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20  # glibc takes no more
_KEPT = 256 << 20


def keep_large_blocks() -> None:
    """Asks glibc to reuse blocks of message size instead of mapping each anew: otherwise the kernel
    clears every page of every message, which costs as much as a copy. Elsewhere it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEPT)
