"""Waits between the processes of an engine that leave the cores to those who compute.

vLLM's engine core and its workers talk through shared memory, and for a second after each message
whoever waits for the next one looks again and again. On a host without GPUs that takes whole cores
from the steps: with two engines on two cores the four that wait are always all of it. Here they
wait for the writer's notice instead. vLLM sends one with every message but may lose it, so they
look at least every `LOOK_MS`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

LOOK_MS = 1


def leave_cores_to_others() -> None:
    """From now on no reader of this process spins."""
    SpinCondition.wait = _wait


def _wait(condition: Any, timeout_ms: int | None = None) -> None:
    """As `SpinCondition.wait`, which spins while the last read is not long ago."""
    soon = time.monotonic() <= condition.last_read + condition.busy_loop_s
    ready = dict(condition.poller.poll(LOOK_MS if soon else timeout_ms))
    if condition.local_notify_socket in ready:
        with suppress(zmq.Again):  # without a notice it looks all the same
            condition.local_notify_socket.recv(flags=zmq.NOBLOCK, copy=False)
