"""Who starts, who waits, who is sent away: the admission core in scenarios."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from cluster.errors import Overloaded
from router.admission.core import Admission
from router.admission.offers import Admit, Capacity, Effect, Offer, Refuse, SloClass, Yield
from router.admission.pace import (
    MAX_RETRY_SECONDS,
    MIN_RETRY_SECONDS,
    MIN_SAMPLES,
    PrefillTimes,
)
from router.admission.policy import Limits, Policy, TenantPolicy
from router.admission.queue import ClassQueue
from router.bounds import MAX_BOUNDS, Bounds

INTERACTIVE, STANDARD, BATCH = SloClass


def offer(name: str, slo_class: SloClass = STANDARD, **fields: Any) -> Offer:
    fields = {
        "tenant": "a",
        "model": "m",
        "prompt_tokens": 10,
        "output_tokens": 10,
        "start_by": math.inf,
        **fields,
    }
    return Offer(name, slo_class=slo_class, **fields)


class Desk:
    """Admission with a capacity; carries nothing out."""

    def __init__(self, capacity: Capacity | None = None, **policy: Any) -> None:
        self.core = Admission(Policy(**{"max_running": 1, "max_queued": 100, **policy}))
        self.capacity = capacity or Capacity()

    def pump(self, now: float = 0.0) -> list[Effect]:
        return self.core.pump(now, {"m": self.capacity})

    def started(self, now: float = 0.0) -> list[str]:
        return [e.request_id for e in self.pump(now) if isinstance(e, Admit)]

    def come(self, *offers: Offer, now: float = 0.0) -> list[str]:
        for each in offers:
            self.core.offer(now, each)
        return self.started(now)

    def leave(self, name: str, now: float = 0.0) -> list[str]:
        self.core.release(now, name, 20)
        return self.started(now)


def test_the_earliest_deadline_starts_first() -> None:
    desk = Desk()
    assert desk.come(offer("running")) == ["running"]
    late, soon = offer("late", start_by=9.0), offer("soon", start_by=5.0)
    assert desk.come(late, soon, offer("whenever")) == []
    assert desk.leave("running") == ["soon"]
    assert desk.leave("soon") == ["late"]
    assert desk.leave("late") == ["whenever"]
    assert desk.leave("whenever") == []
    assert (desk.core.running, desk.core.queued) == (0, 0)


def test_classes_in_order_of_urgency() -> None:
    desk = Desk()
    desk.come(offer("running"))
    desk.come(offer("b", BATCH), offer("s", STANDARD), offer("i", INTERACTIVE))
    assert desk.leave("running") == ["i"]
    assert desk.leave("i") == ["s"]
    assert desk.leave("s") == ["b"]


def test_beyond_the_queue() -> None:
    desk = Desk(max_queued=1)
    desk.come(offer("a"))
    desk.core.check(0, "a", STANDARD)
    desk.come(offer("b"))
    with pytest.raises(Overloaded) as refused:
        desk.core.offer(0, offer("c"))
    assert MIN_RETRY_SECONDS <= refused.value.retry_after_seconds <= MAX_RETRY_SECONDS
    with pytest.raises(Overloaded):
        desk.core.check(0, "a", STANDARD)
    desk.come(offer("i", INTERACTIVE))  # each class has a queue of its own
    desk.core.release(0, "b", 0)
    desk.core.check(0, "a", STANDARD)


def test_no_queue() -> None:
    desk = Desk(max_queued=0)
    assert desk.come(offer("a")) == ["a"]
    with pytest.raises(Overloaded):
        desk.core.offer(0, offer("b"))


def test_work_waits_here_until_the_pools_have_room() -> None:
    desk = Desk(Capacity(prefill_tokens=25, kv_tokens=70), max_running=100)
    four = [offer(name) for name in "abcd"]
    assert desk.come(*four) == ["a", "b"]  # prefill is full
    desk.core.first_token(1, "a")
    assert desk.started(1) == ["c"]
    desk.core.first_token(2, "b")
    assert desk.started(2) == []  # decode is full: 60 tokens of 70
    assert desk.leave("a", 3) == ["d"]


def test_a_long_prompt_does_not_stand_in_front_of_short_ones_nor_starve() -> None:
    desk = Desk(Capacity(prefill_tokens=100, prefill_worker_tokens=100), max_running=100)
    long = offer("long", prompt_tokens=5000, start_by=4.0)
    assert desk.come(offer("s0")) == ["s0"]
    assert desk.come(long, offer("s1")) == ["s1"]
    assert desk.come(offer("s2"), now=1.9) == ["s2"]
    # Half its time is over: from now on nothing passes it.
    assert desk.come(offer("s3"), now=2.0) == []
    for name in ("s0", "s1"):
        desk.core.first_token(2.1, name)
        assert desk.started(2.1) == []
    desk.core.first_token(2.2, "s2")
    assert desk.started(2.2) == ["long"]
    desk.core.first_token(3.0, "long")
    assert desk.started(3.0) == ["s3"]


def test_what_cannot_start_in_time_is_refused_when_it_comes() -> None:
    desk = Desk()
    now = 0.0
    desk.come(*(offer(f"w{i}") for i in range(20)))
    for i in range(10):  # 20 tokens a second
        now = float(i + 1)
        desk.leave(f"w{i}", now)
    assert desk.core.queued == 9
    desk.core.offer(now, offer("later", start_by=now + 11.0))
    with pytest.raises(Overloaded, match="due") as refused:
        desk.core.offer(now, offer("now", start_by=now + 0.5))
    assert refused.value.retry_after_seconds >= 0.25
    desk.core.offer(now, offer("urgent", INTERACTIVE, start_by=now + 2.5))


def test_what_did_not_start_in_time_is_refused_while_it_waits() -> None:
    desk = Desk()
    desk.come(offer("running"))
    desk.come(offer("b", start_by=2.0))
    assert desk.pump(1.9) == []
    (refused,) = desk.pump(2.0)
    assert isinstance(refused, Refuse) and refused.request_id == "b"
    assert desk.core.queued == 0


def test_a_prompt_that_cannot_be_computed_before_the_deadline_is_refused() -> None:
    desk = Desk(max_running=100)
    for i in range(MIN_SAMPLES):
        desk.come(offer(f"long{i}", prompt_tokens=1000))
        desk.core.first_token(5.0, f"long{i}")
        desk.come(offer(f"short{i}", prompt_tokens=10))
        desk.core.first_token(1.0, f"short{i}")
    with pytest.raises(Overloaded, match="deadline"):
        desk.core.offer(5.0, offer("hopeless", prompt_tokens=1000, deadline=9.5))
    desk.come(offer("in time", prompt_tokens=1000, deadline=10.5), now=5.0)
    # Short prompts take as long for each token as a step takes: that says nothing of long ones.
    desk.come(offer("unknown size", prompt_tokens=3000, deadline=9.0), now=5.0)


def saw_prefills(desk: Desk, tokens: int, seconds: float) -> None:
    """Learns it at 0 s; nothing runs afterwards."""
    for i in range(MIN_SAMPLES):
        desk.core.offer(-seconds, offer(f"seen{i}", prompt_tokens=tokens))
        desk.pump(-seconds)
        desk.core.first_token(0.0, f"seen{i}")
        desk.leave(f"seen{i}")


def test_a_prompts_own_time_counts_before_its_first_token_is_due() -> None:
    desk = Desk()
    saw_prefills(desk, 1000, 0.5)
    desk.come(offer("running"))
    desk.come(
        offer("long", prompt_tokens=1000, start_by=2.0), offer("short", start_by=2.0), now=0.0
    )
    assert desk.pump(1.45) == []
    (refused,) = desk.pump(1.55)
    assert isinstance(refused, Refuse) and refused.request_id == "long"
    assert desk.leave("running", 1.9) == ["short"]


def test_a_prompts_own_time_takes_half_of_what_is_left_at_most() -> None:
    desk = Desk()
    saw_prefills(desk, 1000, 60.0)
    desk.come(offer("running"))
    desk.come(offer("long", prompt_tokens=1000, start_by=4.0))
    assert desk.pump(1.9) == []
    assert [type(effect) for effect in desk.pump(2.0)] == [Refuse]


def paced_desk(**fields: Any) -> tuple[Desk, float]:
    """One runs, and 20 tokens start a second, as long as some wait; nothing waits."""
    desk = Desk(**fields)
    now = 0.0
    desk.come(*(offer(f"w{i}") for i in range(11)))
    for i in range(10):
        now = float(i + 1)
        desk.leave(f"w{i}", now)
    assert (desk.core.running, desk.core.queued) == (1, 0)
    return desk, now


def test_the_wait_is_foreseen_with_caution() -> None:
    desk, now = paced_desk()
    desk.come(offer("a", start_by=now + 2.1), now=now)  # 1 s by the pace of late
    with pytest.raises(Overloaded, match="due"):
        desk.core.offer(now, offer("b", start_by=now + 3.9))
    desk.core.offer(now, offer("b", start_by=now + 4.1))


def test_starts_that_waited_for_nothing_say_nothing_of_the_pace() -> None:
    desk, now = paced_desk()
    desk.leave("w10", now)
    for i in range(1000):
        now += 0.01
        assert desk.come(offer(f"quick{i}"), now=now) == [f"quick{i}"]
        desk.leave(f"quick{i}", now)
    desk.come(offer("running"), now=now)
    desk.come(offer("a", start_by=now + 2.5), now=now)
    with pytest.raises(Overloaded, match="due"):
        desk.core.offer(now, offer("b", start_by=now + 3.5))


def full_desk(step_seconds: float, slo_class: SloClass = STANDARD) -> Desk:
    """A pool of ten places that filled at once, each for 100 tokens."""
    capacity = Capacity(sequences=10, step_seconds=lambda sequences: step_seconds)
    desk = Desk(capacity, max_running=100, batch_share=1.0)
    fills = [offer(f"r{i}", slo_class, output_tokens=100) for i in range(10)]
    assert len(desk.come(*fills)) == 10
    return desk


def test_a_pool_that_filled_quickly_empties_no_sooner_than_its_decodes_end() -> None:
    desk = full_desk(0.1)  # one in ten ends a second
    desk.come(offer("a", output_tokens=100, start_by=2.1))
    with pytest.raises(Overloaded, match=r"would wait 2.0 s"):
        desk.core.offer(0, offer("b", output_tokens=100, start_by=3.9))
    desk.core.offer(0, offer("b", output_tokens=100, start_by=4.1))


def test_a_pool_full_of_batch_work_empties_at_once() -> None:
    desk = full_desk(0.1, BATCH)
    desk.core.offer(0, offer("now", start_by=0.1))
    assert [type(effect) for effect in desk.pump()] == [Yield, Admit]


def test_what_a_prompt_is_expected_to_take_counts_before_any_was_seen() -> None:
    desk = Desk(Capacity(prefill_seconds=lambda tokens: tokens * 1e-3))
    desk.come(offer("running"))
    desk.come(offer("long", prompt_tokens=1000, start_by=4.0))
    assert desk.pump(2.9) == []
    assert [type(effect) for effect in desk.pump(3.0)] == [Refuse]


def test_a_newcomer_that_is_due_sooner_does_not_make_others_late() -> None:
    desk, now = paced_desk()
    desk.come(*(offer(f"a{i}", start_by=now + 6.5) for i in range(3)), now=now)
    desk.come(*(offer(f"soon{i}", start_by=now + 6.2) for i in range(3)), now=now)
    with pytest.raises(Overloaded, match="one that came before"):
        desk.core.offer(now, offer("soon3", prompt_tokens=20, start_by=now + 6.1))
    desk.come(offer("urgent", INTERACTIVE, prompt_tokens=20, start_by=now + 6.1), now=now)
    assert desk.core.queued == 7


def test_a_class_waits_at_its_own_pace() -> None:
    """Where more urgent work takes most of the room, the rest starts seldom."""
    desk = Desk(patience_seconds={INTERACTIVE: math.inf, STANDARD: 10.0, BATCH: math.inf})
    (running,) = desk.come(offer("i0", INTERACTIVE), *(offer(f"s{i}") for i in range(9)))
    for i in range(40):
        desk.core.offer(i, offer(f"i{i + 1}", INTERACTIVE))
        (running,) = desk.leave(running, float(i))
    assert desk.core.queued_in(STANDARD) == 6  # one start in ten
    desk.core.offer(40, offer("sooner", INTERACTIVE, start_by=52.0))
    with pytest.raises(Overloaded, match="due"):
        desk.core.offer(40, offer("late", start_by=60.0))


def test_decodes_keep_the_strictest_pace_among_them() -> None:
    paces = {0.1: 4.0, 0.5: 6.0, math.inf: math.inf}
    desk = Desk(Capacity(paced=lambda seconds: paces[seconds]), max_running=100)
    patient = [offer(f"p{i}", tpot_seconds=0.5) for i in range(8)]
    assert desk.come(*patient) == [f"p{i}" for i in range(6)]
    assert desk.come(offer("strict", INTERACTIVE, tpot_seconds=0.1)) == []
    for i in range(3):
        desk.core.release(1, f"p{i}", 20)
    assert desk.started(1) == ["strict"]
    assert desk.leave("p3", 2) == ["p6"]
    assert desk.leave("strict", 3) == ["p7"]
    whenever = [offer(f"w{i}") for i in range(3)]
    assert desk.come(*whenever, now=4) == ["w0", "w1"]  # those that run keep their bound


def test_a_strict_request_costs_others_one_worker_at_most() -> None:
    paces = {0.01: 8.0, 0.1: 40.0}  # of four workers: two each, and ten
    capacity = Capacity(paced=lambda seconds: paces[seconds], decode_workers=4)
    desk = Desk(capacity, max_running=100)
    assert desk.come(offer("strict", tpot_seconds=0.01)) == ["strict"]
    others = [offer(f"o{i}", tpot_seconds=0.1) for i in range(40)]
    assert len(desk.come(*others)) == 31  # one beside it, and ten on each of the rest
    desk.leave("strict")
    assert (desk.core.running, desk.core.queued) == (40, 0)


def test_strict_requests_wait_for_a_worker_and_do_not_starve() -> None:
    paces = {0.01: 2.0, 0.1: 10.0}
    endless = dict.fromkeys(SloClass, math.inf)
    capacity = Capacity(paced=lambda seconds: paces[seconds])
    desk = Desk(capacity, max_running=100, patience_seconds=endless)
    assert len(desk.come(*(offer(f"o{i}", tpot_seconds=0.1) for i in range(10)))) == 10
    assert desk.come(offer("strict", INTERACTIVE, tpot_seconds=0.01, start_by=20.0)) == []
    # Others that come pass it for 5 s; from then on it is next.
    desk.come(*(offer(f"n{i}", tpot_seconds=0.1) for i in range(20)), now=6.0)
    for i in range(8):
        assert desk.leave(f"o{i}", 7.0 + i) == []
    assert desk.leave("o8", 16.0) == ["strict"]


def test_bounds_of_all_sorts_are_kept_apart_up_to_a_number() -> None:
    bounds = Bounds()
    asked = [0.001 * (i + 1) for i in range(3 * MAX_BOUNDS)]
    for seconds in asked:
        bounds.add(seconds, 2)
    assert len(list(bounds)) == MAX_BOUNDS
    assert sum(count for _, count in bounds) == 2 * len(asked)
    for seconds in reversed(asked):
        bounds.remove(seconds, 2)
    assert (list(bounds), bounds.strictest) == ([], math.inf)


def test_batch_takes_a_share_of_the_pace_and_yields_it() -> None:
    desk = Desk(Capacity(paced=lambda seconds: 4.0), max_running=100, batch_share=0.5)
    batch = [offer(f"b{i}", BATCH) for i in range(3)]
    assert desk.come(*batch) == ["b0", "b1"]
    assert desk.come(offer("s0"), offer("s1")) == ["s0", "s1"]
    desk.core.offer(0, offer("s2"))
    assert desk.pump() == [Yield("b1"), Admit("s2")]


def test_a_prompt_takes_as_long_as_what_no_cache_holds_of_it() -> None:
    desk = Desk()
    saw_prefills(desk, 1000, 1.0)
    with pytest.raises(Overloaded):
        desk.core.offer(0.0, offer("cold", prompt_tokens=1000, deadline=0.5))
    warm = {"prompt_tokens": 1000, "cached_tokens": 990, "deadline": 0.5}
    assert desk.come(offer("warm", **warm)) == ["warm"]
    # What it found where it was placed counts, and not what was known when it came.
    desk.core.first_token(0.4, "warm", 600)
    desk.leave("warm", 0.4)
    for i in range(MIN_SAMPLES):
        desk.come(offer(f"w{i}", **{**warm, "deadline": 2.0}), now=1.0)
        desk.core.first_token(1.3, f"w{i}", 10)
        desk.leave(f"w{i}", 1.3)
    with pytest.raises(Overloaded):
        desk.core.offer(2.0, offer("too late", **{**warm, "deadline": 2.2}))


def test_prefill_times_at_best_and_likely() -> None:
    times = PrefillTimes()
    for i in range(MIN_SAMPLES - 1):
        times.saw(0.0, "m", 600, 1.0 + (i % 2))
    assert (times.at_best("m", 600), times.likely(0.0, "m", 600)) == (0.0, 0.0)
    times.saw(0.0, "m", 600, 2.0)
    assert times.at_best("m", 600) == pytest.approx(1.0, rel=0.1)
    assert times.likely(0.0, "m", 600) == pytest.approx(1.5 + 2 * 0.5)
    assert times.likely(0.0, "m", 10) == times.likely(0.0, "other", 600) == 0.0
    for _ in range(50):
        times.saw(20.0, "m", 600, 3.0)
    assert times.likely(20.0, "m", 600) == pytest.approx(3.0, rel=0.1)
    assert times.likely(100.0, "m", 600) == times.at_best("m", 600)


def test_batch_takes_no_room_that_online_work_waits_for() -> None:
    desk = Desk(Capacity(kv_tokens=100), max_running=100)
    assert desk.come(offer("s0", prompt_tokens=50)) == ["s0"]
    assert desk.come(offer("large", prompt_tokens=80)) == []
    assert desk.come(offer("b", BATCH, prompt_tokens=5, output_tokens=5)) == []
    assert desk.leave("s0") == ["large"]
    assert desk.leave("large") == ["b"]


def test_batch_yields_to_online_work_at_once_and_waits_again() -> None:
    desk = Desk(max_running=4, batch_share=0.5)
    assert desk.come(*(offer(f"b{i}", BATCH) for i in range(3))) == ["b0", "b1"]
    assert desk.come(offer("s0"), offer("i0", INTERACTIVE)) == ["i0", "s0"]
    desk.core.offer(1, offer("i1", INTERACTIVE))
    assert desk.pump(1) == [Yield("b1"), Admit("i1")]
    desk.core.offer(1, offer("i2", INTERACTIVE))
    assert desk.pump(1) == [Yield("b0"), Admit("i2")]
    assert desk.core.queued == 3
    assert desk.leave("i0", 2) == []  # more than batch's share is still taken
    assert desk.leave("i1", 2) == []
    assert desk.leave("i2", 2) == ["b2"]  # the one that has waited longest
    assert desk.leave("s0", 2) == ["b1"]
    assert desk.leave("b2", 3) == ["b0"]
    desk.core.release(3, "b1", 20)
    desk.core.release(3, "b0", 20)
    assert (desk.core.running, desk.core.queued) == (0, 0)


def test_batch_does_not_starve_and_online_work_does_not_wait_for_it() -> None:
    desk = Desk(max_running=1)
    desk.come(offer("i0", INTERACTIVE), offer("b0", BATCH), offer("b1", BATCH))
    assert desk.started(59.0) == []
    assert desk.started(60.0) == ["b0"]  # beside the one that runs
    assert desk.started(121.0) == []  # one at a time
    assert desk.come(offer("i1", INTERACTIVE), now=122.0) == []
    assert desk.leave("i0", 122.0) == ["i1"]
    assert desk.leave("b0", 123.0) == ["b1"]


def test_a_standard_request_starts_within_its_patience() -> None:
    desk = Desk()
    desk.come(offer("i0", INTERACTIVE), offer("s", STANDARD), offer("i1", INTERACTIVE))
    assert desk.leave("i0", 4.0) == ["i1"]
    desk.come(offer("i2", INTERACTIVE), offer("s2", STANDARD), now=4.0)
    assert desk.leave("i1", 5.0) == ["s"]
    assert desk.leave("s", 6.0) == ["i2"]


def test_tenants_share_by_weight() -> None:
    weights = {"light": TenantPolicy(weight=1.0), "heavy": TenantPolicy(weight=3.0)}
    desk = Desk(tenants=weights, max_queued=10_000)
    desk.come(offer("running", tenant="other"))
    for i in range(400):
        for tenant in weights:
            name = f"{tenant} {i}"
            desk.core.offer(0, offer(name, tenant=tenant, prompt_tokens=1000, output_tokens=0))
    order = []
    running = "running"
    for _ in range(400):
        desk.core.release(0, running, 1000)
        (running,) = desk.started()
        order.append(running.split()[0])
    assert order.count("heavy") == pytest.approx(300, abs=18)


def test_a_tenant_that_floods_does_not_hold_up_another() -> None:
    desk = Desk(max_queued=10_000)
    desk.come(*(offer(f"f{i}", tenant="flood", prompt_tokens=5000) for i in range(100)))
    for i in range(10):
        desk.leave(f"f{i}")
    desk.come(offer("one", tenant="quiet", start_by=99.0))
    assert desk.leave("f10") == ["one"]


def test_rates_are_limited_and_say_when_to_come_back() -> None:
    limits = Limits(requests_per_second=2, burst_seconds=1)
    desk = Desk(tenants={"a": TenantPolicy(limits=limits)}, max_running=100)
    assert desk.come(offer("1"), offer("2")) == ["1", "2"]
    with pytest.raises(Overloaded, match="2 requests per second") as refused:
        desk.core.offer(0, offer("3"))
    assert refused.value.retry_after_seconds == pytest.approx(0.5)
    assert desk.come(offer("other", tenant="b")) == ["other"]
    assert desk.come(offer("3"), now=0.5) == ["3"]


def test_tokens_are_charged_by_what_was_used() -> None:
    limits = Limits(tokens_per_second=10, burst_seconds=10)
    desk = Desk(tenants={"a": TenantPolicy(limits=limits)}, max_running=100)
    assert desk.come(offer("1", output_tokens=200)) == ["1"]  # into debt: 100 - 210
    with pytest.raises(Overloaded, match="tokens per second") as refused:
        desk.core.check(0, "a", STANDARD)
    assert refused.value.retry_after_seconds == pytest.approx(11.1)
    desk.core.release(0, "1", 60)
    desk.core.check(0, "a", STANDARD)


def test_concurrency_is_limited_by_waiting_and_waiting_by_refusal() -> None:
    limits = Limits(max_running=1, max_queued=1)
    desk = Desk(tenants={"a": TenantPolicy(limits=limits)}, max_running=100)
    assert desk.come(offer("1")) == ["1"]
    assert desk.come(offer("2")) == []
    with pytest.raises(Overloaded, match="1 requests waiting"):
        desk.core.offer(0, offer("3"))
    assert desk.come(offer("other", tenant="b")) == ["other"]
    assert desk.leave("1") == ["2"]


def test_several_routers_share_a_limit() -> None:
    limits = Limits(requests_per_second=4, burst_seconds=1)
    desk = Desk(tenants={"a": TenantPolicy(limits=limits)}, max_running=100)
    desk.come(offer("1"))
    desk.core.set_share(0, 0.5)
    assert desk.come(offer("2"), offer("3")) == ["2", "3"]
    with pytest.raises(Overloaded) as refused:
        desk.core.check(0, "a", STANDARD)
    assert refused.value.retry_after_seconds == pytest.approx(0.5)


def test_the_delay_follows_the_rate() -> None:
    delays = []
    for gap in (0.1, 5.0):
        desk = Desk(max_queued=10)
        desk.come(offer("0"))
        desk.come(*(offer(str(i)) for i in range(1, 11)))
        for i in range(8):
            now = (i + 1) * gap
            desk.leave(str(i), now)
            desk.come(offer(str(11 + i)), now=now)
        with pytest.raises(Overloaded) as refused:
            desk.core.offer(8 * gap, offer("x"))
        delays.append(refused.value.retry_after_seconds)
    assert delays[0] < delays[1]


def test_what_is_due_before_a_request_is_counted_in_any_order() -> None:
    rng = random.Random(4)
    queue = ClassQueue(lambda tenant: 1.0)
    waiting: dict[str, Offer] = {}
    for number in range(200):
        due = rng.choice([5.0, 10.0, rng.uniform(0, 20)])
        offer = Offer(f"r{number}", "t", SloClass.STANDARD, "m", rng.randint(1, 99), 1, due)
        assert queue.cost_before(due) == sum(o.cost for o in waiting.values() if o.start_by <= due)
        queue.push(0.0, offer, long=False)
        waiting[offer.request_id] = offer
        while waiting and rng.random() < 0.5:
            gone = rng.choice(sorted(waiting))
            assert queue.remove(gone) == waiting.pop(gone)
