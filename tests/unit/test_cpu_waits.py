"""Readers between an engine's processes wait for notice and do not spin."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from cluster.engine.cpu_waits import LOOK_MS, _wait, leave_cores_to_others


class Poller:
    """Counts how long it was asked to wait."""

    def __init__(self, own: zmq.Poller) -> None:
        self._own = own
        self.timeouts: list[int | None] = []

    def poll(self, timeout: int | None = None) -> list[tuple[zmq.Socket, int]]:
        self.timeouts.append(timeout)
        return self._own.poll(timeout)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpinCondition]:
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # put back afterwards
    leave_cores_to_others()
    context = zmq.Context()
    address = f"ipc://{tmp_path}/notify"
    condition = SpinCondition(is_reader=True, context=context, notify_address=address)
    condition.poller = Poller(condition.poller)
    yield condition
    for name in ("local_notify_socket", "read_cancel_socket", "write_cancel_socket"):
        getattr(condition, name).close(linger=0)
    context.term()


def test_soon_after_a_message_the_next_one_is_waited_for(reader: SpinCondition) -> None:
    reader.record_read()
    reader.wait(timeout_ms=5000)
    assert reader.poller.timeouts == [LOOK_MS]  # and then it looks, notice or not


class Socket:
    """With so many notices."""

    def __init__(self, notices: int) -> None:
        self.notices = notices

    def recv(self, flags: int, copy: bool) -> None:
        assert flags == zmq.NOBLOCK
        if not self.notices:
            raise zmq.Again
        self.notices -= 1


@pytest.mark.parametrize("last_read", [math.inf, -math.inf], ids=["soon after one", "long after"])
def test_a_notice_is_taken(last_read: float) -> None:
    """One that stayed would wake every later wait at once; one that was announced and is not there
    ends nothing."""
    notice, cancel = Socket(1), Socket(1)
    ready: list[tuple[Socket, int]] = [(notice, zmq.POLLIN)]
    condition = SimpleNamespace(
        last_read=last_read,
        busy_loop_s=1,
        poller=SimpleNamespace(poll=lambda timeout: ready),
        local_notify_socket=notice,
        read_cancel_socket=cancel,
    )
    _wait(condition)
    _wait(condition)
    assert (notice.notices, cancel.notices) == (0, 1)
    ready[:] = [(cancel, zmq.POLLIN)]  # it ends: that notice stays for whoever looks next
    _wait(condition)
    assert cancel.notices == 1


def test_long_after_a_message_it_is_waited_for_as_long_as_vllm_says(reader: SpinCondition) -> None:
    reader.last_read = time.monotonic() - reader.busy_loop_s - 1
    reader.cancel()
    reader.wait(timeout_ms=5000)
    assert reader.poller.timeouts == [5000]
