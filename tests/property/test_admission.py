"""The admission core under any load: bounded, work-conserving, fair, and batch in the slack only.

A model of its own keeps account of what was admitted; nothing of the core's is looked into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.errors import Overloaded
from router.admission.core import Admission
from router.admission.offers import Admit, Capacity, Offer, Refuse, SloClass, Yield
from router.admission.policy import Limits, Policy, TenantPolicy
from router.admission.queue import QUANTUM_TOKENS

TENANTS = {
    "a": TenantPolicy(weight=1.0),
    "b": TenantPolicy(weight=2.0, limits=Limits(max_running=2)),
}
MODELS = ("m", "n")
MAX_RUNNING = 6


@dataclass
class Running:
    offer: Offer
    prefilling: bool = True


class AdmissionMachine(RuleBasedStateMachine):
    """Requests of all kinds come, get their first token, end, give up; time passes."""

    @initialize(prefill=st.integers(50, 300), kv=st.integers(100, 900), queue=st.integers(0, 12))
    def begin(self, prefill: int, kv: int, queue: int) -> None:
        self.core = Admission(Policy(max_running=MAX_RUNNING, max_queued=queue, tenants=TENANTS))
        self.capacity = Capacity(prefill, 100, kv, 5)
        self.max_queued = queue
        self.now = 0.0
        self.number = 0
        self.waiting: dict[str, Offer] = {}
        self.running: dict[str, Running] = {}
        self.promised: set[str] = set()

    def pump(self) -> None:
        for effect in self.core.pump(self.now, dict.fromkeys(MODELS, self.capacity)):
            match effect:
                case Admit(name, promised):
                    offer = self.waiting.pop(name)
                    self.running[name] = Running(offer)
                    if promised:
                        assert offer.slo_class is SloClass.BATCH
                        self.promised.add(name)
                    else:
                        assert self.fits(offer, without=name)
                case Yield(name):
                    offer = self.running.pop(name).offer
                    self.waiting[name] = replace(offer, start_by=offer.deadline)
                    assert self.waiting[name].slo_class is SloClass.BATCH
                    assert name not in self.promised
                case Refuse(name, error):
                    assert self.waiting.pop(name).start_by <= self.now
                    assert error.retry_after_seconds > 0

    def tenant_may_run(self, tenant: str) -> bool:
        limit = TENANTS[tenant].limits.max_running
        return sum(r.offer.tenant == tenant for r in self.running.values()) < limit

    def fits(self, offer: Offer, without: str = "", online_only: bool = False) -> bool:
        beside = [
            r
            for name, r in self.running.items()
            if name != without and name not in self.promised
            and not (online_only and r.offer.slo_class is SloClass.BATCH)
        ]  # fmt: skip
        if len(beside) >= MAX_RUNNING:
            return False
        same = [r for r in beside if r.offer.model == offer.model]
        if not same:
            return True
        prefill = sum(min(100, r.offer.prompt_tokens) for r in same if r.prefilling)
        return (
            (not prefill or prefill + min(100, offer.prompt_tokens) <= self.capacity.prefill_tokens)
            and sum(r.offer.cost for r in same) + offer.cost <= self.capacity.kv_tokens
            and len(same) < self.capacity.sequences
        )

    @rule(
        slo_class=st.sampled_from(SloClass),
        tenant=st.sampled_from(sorted(TENANTS)),
        model=st.sampled_from(MODELS),
        prompt=st.integers(1, 250),
        output=st.integers(1, 100),
        due=st.sampled_from((0.5, 5.0, 50.0, math.inf)),
    )
    def come(
        self, slo_class: SloClass, tenant: str, model: str, prompt: int, output: int, due: float
    ) -> None:
        self.number += 1
        offer = Offer(
            f"r{self.number}", tenant, slo_class, model, prompt, output, self.now + due,
            self.now + max(due, 100.0),
        )  # fmt: skip
        try:
            self.core.offer(self.now, offer)
        except Overloaded as error:
            assert error.retry_after_seconds >= 0
            return
        self.waiting[offer.request_id] = offer
        self.pump()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.running[name].prefilling = False
        self.core.first_token(self.now, name)
        self.pump()

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data(), tokens=st.integers(0, 400))
    def end(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(sorted({**self.running, **self.waiting})))
        self.running.pop(name, None)
        self.waiting.pop(name, None)
        self.promised.discard(name)
        self.core.release(self.now, name, tokens)
        self.pump()

    @rule(seconds=st.sampled_from((0.1, 1.0, 10.0, 61.0)))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.pump()

    @invariant()
    def counts_agree(self) -> None:
        assert self.core.running == len(self.running)
        assert self.core.queued == len(self.waiting)

    @invariant()
    def bounded(self) -> None:
        assert len(self.running) - len(self.promised) <= MAX_RUNNING
        assert len(self.promised) <= 1
        for tenant, policy in TENANTS.items():
            assert (
                sum(r.offer.tenant == tenant for r in self.running.values())
                <= policy.limits.max_running
            )
        for slo_class in SloClass:
            waiting = sum(o.slo_class is slo_class for o in self.waiting.values())
            yielded = MAX_RUNNING if slo_class is SloClass.BATCH else 0
            assert waiting <= self.max_queued + yielded

    @invariant()
    def nothing_is_overdue(self) -> None:
        assert all(offer.start_by > self.now for offer in self.waiting.values())

    @invariant()
    def online_work_waits_for_online_work_only(self) -> None:
        """If no online request of a model finds room, it is not for batch work that runs; and if
        one waits that would fit, another one of the model is in its way."""
        for model in MODELS:
            waiting = [
                o
                for o in self.waiting.values()
                if o.model == model
                and o.slo_class is not SloClass.BATCH
                and self.tenant_may_run(o.tenant)
            ]
            if waiting:
                assert not all(self.fits(o, online_only=True) for o in waiting)


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    costs=st.lists(st.integers(1, 6000), min_size=30, max_size=60),
    dues=st.lists(st.integers(1, 1000), min_size=30, max_size=60),
)
@settings(max_examples=30, deadline=None)
def test_tenants_that_always_want_are_served_by_weight(
    weights: list[int], costs: list[int], dues: list[int]
) -> None:
    """What two tenants were served, over their weights, differs by a quantum and a request each."""
    tenants = {f"t{i}": TenantPolicy(weight=weight) for i, weight in enumerate(weights)}
    core = Admission(Policy(max_running=1, max_queued=10_000, tenants=tenants))
    work = {}
    for i, (cost, due) in enumerate(zip(costs, dues, strict=False)):
        for tenant in tenants:
            name = f"{tenant}/{i}"
            work[name] = Offer(name, tenant, SloClass.STANDARD, "m", cost, 0, 1e6 + due)
            core.offer(0, work[name])
    served = dict.fromkeys(tenants, 0.0)
    left = {t: sum(o.tenant == t for o in work.values()) for t in tenants}
    running = ""
    while True:
        if running:
            core.release(0, running, work[running].cost)
        (effect,) = core.pump(0, {})
        assert isinstance(effect, Admit)
        running = effect.request_id
        tenant = work[running].tenant
        served[tenant] += work[running].cost / tenants[tenant].weight
        left[tenant] -= 1
        if not left[tenant]:
            return
        assert max(served.values()) - min(served.values()) <= QUANTUM_TOKENS + 2 * max(costs)


@given(load=st.integers(1, 4), seconds=st.integers(150, 250), gap=st.sampled_from((0.5, 1.0, 3.0)))
@settings(max_examples=8, deadline=None)
def test_batch_and_standard_go_on_under_an_endless_stream(
    load: int, seconds: int, gap: float
) -> None:
    """More interactive work than fits, for ever: the other classes start within their patience."""
    policy = Policy(max_running=2, max_queued=500)
    core = Admission(policy)
    last = {SloClass.STANDARD: 0.0, SloClass.BATCH: 0.0}
    running: dict[str, float] = {}
    for slo_class in last:
        for i in range(200):
            core.offer(0, Offer(f"{slo_class}{i}", "a", slo_class, "m", 10, 10, math.inf))
    now, number = 0.0, 0
    while now < seconds:
        for _ in range(load):
            number += 1
            try:
                core.offer(now, Offer(f"i{number}", "a", SloClass.INTERACTIVE, "m", 10, 10, 1e9))
            except Overloaded:
                break
        for name, until in list(running.items()):
            if until <= now:
                del running[name]
                core.release(now, name, 20)
        for effect in core.pump(now, {}):
            match effect:
                case Admit(name, _):
                    running[name] = now + gap
                    if name.startswith(tuple(last)):
                        last[SloClass(name.rstrip("0123456789"))] = now
                case Yield(name):
                    del running[name]
        for slo_class, at in last.items():
            assert (
                not core.queued_in(slo_class)
                or now - at <= policy.patience_seconds[slo_class] + 2 * gap
            )
        now += gap
