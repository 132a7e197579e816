"""Ends that do not wait for steps: what a scheduler tells an agent in its own process, and sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from cluster.kv.connector import landings, near
from cluster.kv.connector.scheduler import SchedulerSide
from cluster.kv.credit import CreditBook
from cluster.kv.handoff import HandoffParams
from cluster.kv.mailbox import Mailbox
from cluster.kv.sender import Release


class Agent:
    """What an agent has for its neighbour."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.released: list[Release] = []
        self.sender = SimpleNamespace(release=self.released.append)

    def post(self, call: Any) -> None:
        call()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    near.announce(agent)  # type: ignore[arg-type]
    yield agent
    near.forget()


def finished(tokens: list[int]) -> tuple[SchedulerSide, Any]:
    """A prefill request of one step that has ended with these tokens, and its side."""
    side = SchedulerSide(4, 100, CreditBook(1 << 30))
    params = HandoffParams("prefill", "h", "ticket", 4, 30.0, ("127.0.0.1:1",))
    request = SimpleNamespace(
        request_id="r",
        kv_transfer_params=params.to_dict(),
        num_computed_tokens=0,
        output_token_ids=tokens,
        num_output_tokens=len(tokens),
        status=RequestStatus.FINISHED_LENGTH_CAPPED if tokens else RequestStatus.FINISHED_ABORTED,
    )
    side.on_new_request(request)  # type: ignore[arg-type]
    return side, request


def step(side: SchedulerSide) -> Any:
    output = SimpleNamespace(
        num_scheduled_tokens={},
        preempted_req_ids=None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
    )
    return side.build(output)  # type: ignore[arg-type]


def test_a_first_token_is_told_at_once(agent: Agent) -> None:
    side, request = finished([42])
    side.request_finished(request)
    assert agent.released == [Release("h", 42)]
    assert step(side).sent == ()


def test_an_end_without_one_follows_its_beginning(agent: Agent) -> None:
    side, request = finished([])
    side.request_finished(request)
    assert agent.released == []
    told = step(side)
    assert [arrival.request for arrival in told.arrivals] == ["r"]
    assert told.sent == (Release("h", None),)


def test_with_no_agent_near_ends_travel_with_steps() -> None:
    side, request = finished([42])
    side.request_finished(request)
    assert step(side).sent == (Release("h", 42),)


def test_a_step_is_planned_with_what_has_landed(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures wait for the outcome of a step, with which vLLM ends their requests."""
    seen: list[Any] = []
    monkeypatch.setattr(
        Scheduler,
        "_update_from_kv_xfer_finished",
        lambda self, output: seen.append(
            (output.finished_recving, output.kv_connector_worker_meta.first_tokens)
        ),
    )
    monkeypatch.setattr(Scheduler, "schedule", lambda self, throttle: seen.append("planned"))
    scheduler = landings.HandoffScheduler.__new__(landings.HandoffScheduler)
    scheduler.requests = {}
    agent.mailbox.received("whole", 42)
    agent.mailbox.received("broken", None)
    agent.mailbox.sent("pushed")
    scheduler.schedule()
    scheduler.schedule()
    assert seen == [({"whole"}, {"whole": 42}), "planned", "planned"]
    left = agent.mailbox.take_finished()
    assert (left.recving, left.failed, left.sending) == ({"broken"}, {"broken"}, {"pushed"})
    assert not left.first_tokens


@pytest.mark.parametrize(
    ("statuses", "waits"),
    [
        ([], False),
        (["WAITING_FOR_REMOTE_KVS"], True),
        (["WAITING_FOR_REMOTE_KVS", "RUNNING"], False),
        (["WAITING_FOR_REMOTE_KVS", "WAITING"], False),
        (["FINISHED_LENGTH_CAPPED"], False),
    ],
)
def test_only_an_engine_whose_requests_all_wait_for_handoffs_waits(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, statuses: list[str], waits: bool
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(agent.mailbox, "wait_received", waited.append)
    monkeypatch.setattr(Scheduler, "schedule", lambda self, throttle: None)
    scheduler = landings.HandoffScheduler.__new__(landings.HandoffScheduler)
    requests = [SimpleNamespace(status=RequestStatus[status]) for status in statuses]
    scheduler.requests = dict(enumerate(requests))  # type: ignore[arg-type]
    scheduler.schedule()
    assert waited == [landings.WAIT_SECONDS] * waits


def test_a_wait_ends_with_what_comes_and_with_what_had_come() -> None:
    mailbox = Mailbox()
    mailbox.received("before", None)
    mailbox.wait_received(60)
    threading.Timer(0.01, lambda: mailbox.received("meanwhile", 7)).start()
    mailbox.wait_received(60)
    assert mailbox.take_landed() == {"meanwhile": 7}


@pytest.mark.parametrize(
    ("ahead", "kind"),
    [(False, landings.HandoffScheduler), (True, landings.AsyncHandoffScheduler)],
)
def test_the_scheduler_is_of_the_kind_that_vllm_would_take(
    ahead: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(scheduler: Any, config: object, **rest: object) -> None:
        scheduler.connector = SimpleNamespace()

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(landings.AsyncScheduler, "__init__", init)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=ahead))
    assert type(landings.make_scheduler(config, log_stats=False)) is kind  # type: ignore[arg-type]
