"""One model's planner at work in the controller: what it is told, and what it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from cluster.config import Config, ModelConfig
from cluster.control.traffic import Look
from cluster.control.wanted import policy_of
from cluster.planner.forecast import Forecast, Holt, Seasonal
from cluster.planner.online import OnlinePerformance
from cluster.planner.performance import Performance
from cluster.planner.planner import Planner
from cluster.planner.state import (
    ROLES,
    ClassTargets,
    Counts,
    Decision,
    Observed,
    Traffic,
    WorkerSeen,
)
from cluster.store.plan_records import PlanState
from router.demand import DecodeStep, PrefillStep

NO_TARGETS_FACTOR = 10.0
"""A class without targets gets so many times the cluster's own: it waits, but not for ever."""


class ModelPlanner:
    """Keeps the planner's settings those of the configuration and of the state."""

    def __init__(self, config: Config, model: ModelConfig, speed: Performance) -> None:
        self._online = OnlinePerformance(speed)
        self._model = model
        self._targets = targets_of(config)
        self._planner = Planner(
            policy_of(config, PlanState(base={model.name: {}}), model, planning=True),
            speed,
            self._targets,
            _forecast(config),
            model.max_num_batched_tokens,
        )
        self._last: tuple[Mapping[str, Traffic], float, int] | None = None

    def decide(
        self,
        now: float,
        config: Config,
        state: PlanState,
        workers: Sequence[WorkerSeen],
        look: Look | None,
    ) -> Decision:
        """One decision; without a new look at the traffic the last one grows old."""
        planner = self._planner
        planner.set_policy(policy_of(config, state, self._model, planning=True))
        if (targets := targets_of(config)) != self._targets:
            self._targets = targets
            planner.set_targets(targets)
        held = state.manual.get(self._model.name, {})
        for role in ROLES:
            if role in held:
                planner.hold(role, held[role])
            else:
                planner.release(role)
        if look is not None:
            traffic = look.traffic.get(self._model.name) or {"interactive": Traffic(0.0)}
            self._last = traffic, look.at, look.queued.get(self._model.name, 0)
        seen, at, queued = self._last or ({}, now, 0)
        return planner.step(now, Observed(tuple(workers), seen, at, queued))

    def learn(self, steps: Iterable[PrefillStep | DecodeStep]) -> None:
        """Measured steps of this model's workers."""
        self._online.shares(self._planner.beside)
        for step in steps:
            if step.model != self._model.name:
                continue
            if isinstance(step, PrefillStep):
                self._online.prefill_measured(step.new, step.cached, step.seconds)
            else:
                self._online.decode_measured(round(step.batch), step.context, step.seconds)
        self._planner.use(self._online.current)

    @property
    def errors(self) -> dict[str, float]:
        """Of the model of a worker, by step, where they are known."""
        known = {"prefill": self._online.prefill_error, "decode": self._online.decode_error}
        return {step: error for step, error in known.items() if math.isfinite(error)}

    @property
    def label(self) -> str:
        """What the model of a worker was made from."""
        return self._online.base.label


def targets_of(config: Config) -> dict[str, ClassTargets]:
    """By class; a class without its own has the cluster's, batch work many times those."""
    targets = {}
    for name in ("interactive", "standard", "batch"):
        own = getattr(config.classes, name)
        factor = NO_TARGETS_FACTOR if name == "batch" else 1.0
        targets[name] = ClassTargets(
            own.ttft_seconds or config.targets.ttft_seconds * factor,
            own.tpot_seconds or config.targets.tpot_seconds * factor,
            config.planner.share,
        )
    return targets


def numbers(counts: Counts) -> dict[str, int]:
    """By role, those that are not 0."""
    return {role: counts.of(role) for role in ROLES if counts.of(role)}


def _forecast(config: Config) -> Callable[[], Forecast]:
    season = config.planner.season_seconds
    if season is None:
        return Holt
    period = max(2, round(season / config.planner.interval_seconds))
    return lambda: Seasonal(period)
