"""What the controller tells about a slot."""

from __future__ import annotations

from pathlib import Path

from cluster.control.actors import Where
from cluster.control.reconcile import Life, Slot, SlotState, ended
from cluster.control.status import ClusterStatus, slot_status
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.store.registry import Members

WORKER = Slot("worker", "m-prefill-0", "m", "prefill")
ROUTER = Slot("router", "router-0")
STARTING = Life("aa", "starting", 10.0)


class Here:
    """A life that has its process."""

    where = Where("10.0.0.3", 7, Path("/logs/m.log"))

    def waits_for(self) -> str:
        return ""


class NeedsGpu:
    where = None

    def waits_for(self) -> str:
        return "for 1 GPU"


def test_a_life_that_has_no_place_says_what_it_waits_for() -> None:
    status = slot_status(12.0, SlotState(WORKER, STARTING), NeedsGpu(), None)
    assert (status.state, status.detail, status.seconds) == ("waiting", "for 1 GPU", 2.0)


def test_the_records_of_its_own_life_speak_for_it() -> None:
    mine = WorkerRecord("m-prefill-0", "aa", "m", "prefill", "starting", pid=7, detail="loading")
    status = slot_status(12.0, SlotState(WORKER, STARTING), Here(), Members((mine,), ()))
    assert (status.state, status.detail, status.pid) == ("starting", "loading", 7)
    assert (status.host, status.log) == ("10.0.0.3", "/logs/m.log")
    former = WorkerRecord("m-prefill-0", "zz", "m", "prefill", "ready", pid=6, detail="old")
    status = slot_status(12.0, SlotState(WORKER, STARTING), None, Members((former,), ()))
    assert (status.detail, status.pid) == ("", 0)


def test_a_router_that_is_ready_gives_its_addresses() -> None:
    record = RouterRecord("router-0", "aa", "h:1", "h:2")
    life = Life("aa", "ready", 10.0, 11.0)
    status = slot_status(12.0, SlotState(ROUTER, life), None, Members((), (record,)))
    assert (status.grpc_address, status.http_address) == ("h:1", "h:2")
    assert ClusterStatus(True, False, (status,)).ready


def test_a_failure_tells_the_reason_the_try_and_the_pause() -> None:
    state = ended(SlotState(WORKER, STARTING), 12.0, "no kernel")
    status = slot_status(12.5, state, None, None)
    assert status.state == "waiting"
    assert status.detail == "no kernel; try 2 of 3 after 1 s"
