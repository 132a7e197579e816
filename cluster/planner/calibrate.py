"""Fits a worker's performance to a profile, and says how far off the fit is.

Relative least squares with coefficients ≥ 0: a millisecond matters as much in a short step as ten
in a long one, and no cost is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import InvalidRequest
from cluster.planner.performance import (
    Contention,
    DecodeCost,
    HandoffCost,
    Launch,
    Performance,
    PrefillCost,
)
from cluster.planner.profile import (
    DecodeSample,
    HandoffSample,
    LaunchSample,
    PathSample,
    PrefillSample,
    Profile,
    SharedSample,
)

MIN_SAMPLES = 3
MAX_LOST = 0.9
"""Of a second beside another worker's step, at most."""

S = TypeVar("S")


@dataclass(frozen=True)
class FitError:
    """Relative errors over the samples, each predicted by a fit to all the others.

    Attributes:
        median, p90: |predicted − measured| ÷ measured; NaN where nothing was measured.
    """

    samples: int
    median: float
    p90: float


@dataclass(frozen=True)
class Calibration:
    """A performance that was fitted, and its own errors."""

    performance: Performance
    prefill_error: FitError
    decode_error: FitError


def calibrate(start: Performance, profile: Profile) -> Calibration:
    """`start` with the costs that the profile measured; what it did not measure is kept.

    Raises:
        InvalidRequest: fewer than `MIN_SAMPLES` samples of a kind.
    """
    for kind, count in (("prefill", len(profile.prefill)), ("decode", len(profile.decode))):
        if count < MIN_SAMPLES:
            raise InvalidRequest(
                "profile", f"has {count} {kind} samples, {MIN_SAMPLES} are the least to fit"
            )
    start = replace(start, chunk=profile.chunk)

    def fit_prefill(samples: Sequence[PrefillSample]) -> Performance:
        if profile.ahead:
            return _behind(_fit_launches(start, samples, profile.graph_tokens), profile.launch)
        return _fit_prefill(start, samples)

    fitted = _fit_decode(fit_prefill(profile.prefill), profile.decode)
    if profile.handoff:
        fitted = _fit_handoff(fitted, profile.handoff)
    if profile.path:
        fitted = _fit_path(fitted, profile.path)
    if profile.shared:
        fitted = replace(fitted, contention=_fit_contention(profile.shared))
    prefill_error = _cross_validated(
        profile.prefill,
        fit_prefill,
        lambda p, s: (p.prefill_seconds(s.new, s.cached), s.seconds),
    )
    decode_error = _cross_validated(
        profile.decode,
        lambda rest: _fit_decode(start, rest),
        lambda p, s: (p.decode_seconds(s.batch, s.context), s.seconds),
    )
    label = start.label.replace("roofline", "") + "calibrated"
    return Calibration(replace(fitted, label=label), prefill_error, decode_error)


def _fit_prefill(
    start: Performance, samples: Sequence[PrefillSample], once: bool = True
) -> Performance:
    """What a prompt takes once can be told from what its steps do where some take several."""
    steps = [start.prefill_steps(s.new) for s in samples]
    rows = [
        (float(n), float(s.new), float(s.new * (s.new + 2 * s.cached)), float(once))
        for n, s in zip(steps, samples, strict=True)
    ]
    base, per_token, per_pair, prompt = fit(rows, [s.seconds for s in samples])
    floor = min(start.prefill.floor, *(s.seconds / n for n, s in zip(steps, samples, strict=True)))
    return replace(start, prefill=PrefillCost(base, per_token, per_pair, floor, prompt))


def _fit_launches(
    start: Performance, samples: Sequence[PrefillSample], graph_tokens: int
) -> Performance:
    """Short prompts take as long as their step's launch, long ones as the device: of all lengths
    that could part them, the one with the least relative squared error."""
    best, least = _fit_prefill(start, samples, once=False), math.inf
    for longest in (0, *sorted({s.new for s in samples})):
        launched = [s for s in samples if s.new <= longest]
        computed = [s for s in samples if s.new > longest]
        if len(computed) < MIN_SAMPLES:
            break
        within = _level([s.seconds for s in launched if s.new <= graph_tokens])
        beyond = _level([s.seconds for s in launched if s.new > graph_tokens]) or within
        fitted = _fit_prefill(start, computed, once=False)
        worker = replace(fitted, launch=Launch(graph_tokens, within, beyond))
        off = sum((worker.prefill_seconds(s.new, s.cached) / s.seconds - 1) ** 2 for s in samples)
        if off < least:
            best, least = worker, off
    return best


def _behind(fitted: Performance, samples: Sequence[LaunchSample]) -> Performance:
    """With the launches of steps behind others; where none was measured, they take as long."""
    if fitted.launch is None:
        return fitted
    launch = fitted.launch
    within = [s.seconds for s in samples if s.new <= launch.graph_tokens]
    beyond = [s.seconds for s in samples if s.new > launch.graph_tokens]
    launch = replace(launch, next_within=_level(within), next_beyond=_level(beyond))
    return replace(fitted, launch=launch)


def _level(seconds: Sequence[float]) -> float:
    """The constant that is off least; 0 of nothing."""
    return fit([(1.0,)] * len(seconds), seconds)[0] if seconds else 0.0


def _fit_decode(start: Performance, samples: Sequence[DecodeSample]) -> Performance:
    """One line below the large batches and one above, where both have samples enough."""
    small = [s for s in samples if s.batch < start.large_batch]
    large = [s for s in samples if s.batch >= start.large_batch]
    if len(small) < MIN_SAMPLES or len(large) < MIN_SAMPLES:
        small = large = list(samples)
    return replace(start, decode=_decode_line(small), decode_large=_decode_line(large))


def _decode_line(samples: Sequence[DecodeSample]) -> DecodeCost:
    rows = [(1.0, float(s.context), float(s.batch)) for s in samples]
    return DecodeCost(*fit(rows, [s.seconds for s in samples]))


def _fit_handoff(start: Performance, samples: Sequence[HandoffSample]) -> Performance:
    latency, per_byte = fit([(1.0, float(s.bytes)) for s in samples], [s.seconds for s in samples])
    bandwidth = 1 / per_byte if per_byte > 0 else start.handoff.bandwidth
    return replace(start, handoff=HandoffCost(latency, bandwidth, start.handoff.layers))


def _fit_path(start: Performance, samples: Sequence[PathSample]) -> Performance:
    """What is outside of the steps, at the median.

    Between the first two tokens decode takes one step; what the last layer's copy does not explain
    of the rest is the handoff's latency.
    """
    dispatch = quantile(sorted(s.before for s in samples), 0.5)
    late = []
    for sample in (s for s in samples if s.bytes):
        step = start.decode_seconds(1, sample.prompt)
        copy = sample.bytes / start.handoff.bandwidth / start.handoff.layers
        late.append(max(0.0, sample.between - step - copy))
    handoff = start.handoff
    if late:
        handoff = replace(handoff, latency=quantile(sorted(late), 0.5))
    return replace(start, dispatch=dispatch, handoff=handoff)


def _fit_contention(samples: Sequence[SharedSample]) -> Contention:
    """Of each second beside another worker's step, a share q is lost, and of decode's steps a
    constant to each handoff: seconds = alone + q·beside + handoff·handoffs. A step all of which is
    beside another takes 1/(1 − q) times as long.
    """
    lost = {
        step: _lost([s for s in samples if s.step == step])
        for step in ("prefill", "decode", "dispatch")
    }
    slowed = {step: 1 / (1 - share) for step, (share, _) in lost.items()}
    return Contention(**slowed, handoff=lost["decode"][1])


def _lost(samples: Sequence[SharedSample]) -> tuple[float, float]:
    """q, and the seconds that a handoff takes; both relative to the samples' seconds."""
    if not samples:
        return 0.0, 0.0
    rows = [[s.beside / s.seconds, s.handoffs / s.seconds] for s in samples]
    share, handoff = not_negative(rows, [1.0 - s.alone / s.seconds for s in samples])
    return min(share, MAX_LOST), handoff


def _cross_validated(
    samples: Sequence[S],
    fitted: Callable[[Sequence[S]], Performance],
    predict: Callable[[Performance, S], tuple[float, float]],
) -> FitError:
    errors = []
    for left_out, sample in enumerate(samples):
        rest = [s for i, s in enumerate(samples) if i != left_out]
        predicted, measured = predict(fitted(rest), sample)
        errors.append(abs(predicted - measured) / measured)
    errors.sort()
    return FitError(len(errors), quantile(errors, 0.5), quantile(errors, 0.9))


def quantile(ascending: Sequence[float], q: float) -> float:
    """By linear interpolation; NaN of nothing."""
    if not ascending:
        return math.nan
    position = q * (len(ascending) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (position - low) * (ascending[high] - ascending[low])


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients ≥ 0 that minimise Σ((row·c − s)/s)²."""
    weighted = [[x / s for x in row] for row, s in zip(rows, seconds, strict=True)]
    return not_negative(weighted, [1.0] * len(weighted))


def not_negative(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Coefficients ≥ 0 that minimise Σ(row·c − w)². Few columns: every set of them is tried.

    The best least-squares fit whose coefficients are all positive, over all subsets of columns, is
    the non-negative optimum; with four columns that is fifteen tiny systems.
    """
    columns = len(rows[0])
    scale = [max(abs(row[c]) for row in rows) or 1.0 for c in range(columns)]
    best, best_error = [0.0] * columns, sum(w * w for w in wanted)
    for subset in range(1, 1 << columns):
        chosen = [c for c in range(columns) if subset >> c & 1]
        matrix = [[row[c] / scale[c] for c in chosen] for row in rows]
        solution = _normal_equations(matrix, wanted)
        if solution is None or min(solution) < 0:
            continue
        error = sum(
            (sum(x * c for x, c in zip(row, solution, strict=True)) - w) ** 2
            for row, w in zip(matrix, wanted, strict=True)
        )
        if error < best_error - 1e-12:
            best_error = error
            best = [0.0] * columns
            for c, value in zip(chosen, solution, strict=True):
                best[c] = value / scale[c]
    return best


def _normal_equations(
    matrix: Sequence[Sequence[float]], wanted: Sequence[float]
) -> list[float] | None:
    """Least squares by Gaussian elimination; None where it is singular."""
    n = len(matrix[0])
    a = [[sum(r[i] * r[j] for r in matrix) for j in range(n)] for i in range(n)]
    b = [sum(r[i] * w for r, w in zip(matrix, wanted, strict=True)) for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(a[k][i]))
        if abs(a[pivot][i]) < 1e-12:
            return None
        a[i], a[pivot], b[i], b[pivot] = a[pivot], a[i], b[pivot], b[i]
        for k in range(i + 1, n):
            factor = a[k][i] / a[i][i]
            for j in range(i, n):
                a[k][j] -= factor * a[i][j]
            b[k] -= factor * b[i]
    solution = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(a[i][j] * solution[j] for j in range(i + 1, n))
        solution[i] = (b[i] - rest) / a[i][i]
    return solution
