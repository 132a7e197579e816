"""What a completion teaches of the workers that served it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from router.demand import DecodeStep, PrefillStep
from router.fleet import Fleet
from router.output import CompletionReport, Stage
from router.placement import Candidate
from router.share import Share

MAX_BUSY_SHARE = 0.5
"""Of a worker's time that prompts take: beside more, a decode's pace says little of its own."""

MAX_LEARNED_BUSY = 0.9
"""As `MAX_BUSY_SHARE`, for what placement goes by. Near 1 the share that decodes have left is what
rounding makes of it; a worker whose steps seem to take a tenth draws what then comes late."""


@dataclass(frozen=True)
class Observed:
    """Seconds of a completion, as far as placement predicts them.

    Attributes:
        prefill: of computing `uncached` prompt tokens.
        exposed: of moving `moved` tokens' KV, that nothing hid; None: nothing was handed off.
        decode: from its second token to its last one of `tokens`.
    """

    prompt: int
    uncached: int
    prefill: float
    tokens: int
    decode: float
    moved: int = 0
    exposed: float | None = None

    @classmethod
    def of(cls, report: CompletionReport, prompt_tokens: int) -> Observed:
        """What a router saw."""
        phases, handoff = report.phases, report.handoff
        return cls(
            prompt_tokens,
            max(1, prompt_tokens - report.cached_prompt_tokens),
            phases.prefill,
            report.tokens,
            phases.decode,
            prompt_tokens - handoff.held_tokens if handoff is not None else 0,
            phases.handoff_wait + phases.decode_queue if handoff is not None else None,
        )


def learn(
    fleet: Fleet,
    now: float,
    model: str,
    chosen: Candidate,
    shares: Mapping[Stage, Share],
    seen: Observed,
) -> None:
    """Teaches `fleet`; a worker whose life has ended since is left out."""
    first = shares.get(Stage.PREFILL) or shares[Stage.WHOLE]
    rest = shares.get(Stage.DECODE) or shares.get(Stage.WHOLE)
    if seen.prefill > 0 and _lives(fleet, first, chosen):
        fleet.saw_prefill(first.slot, seen.uncached, seen.prefill)
    gaps = seen.tokens - 2
    if rest is not None and _lives(fleet, rest, chosen):
        busy = fleet.busy_of(now, rest.slot)
        if gaps > 0 and seen.decode > 0 and busy < MAX_LEARNED_BUSY:
            # What prompts on the same worker take from its decodes is counted apart.
            batch = 1.0 + (rest.batch + max(0.0, float(fleet.decodes[rest.slot]))) / 2
            fleet.saw_step(rest.slot, batch, seen.decode / gaps * (1.0 - busy))
        if seen.exposed is not None:
            fleet.saw_exposed(rest.slot, seen.moved, seen.exposed)
    fleet.saw_output(model, seen.tokens)


def steps_of(
    fleet: Fleet, now: float, model: str, shares: Mapping[Stage, Share], seen: Observed
) -> Iterator[PrefillStep | DecodeStep]:
    """What the planner's model of a worker can learn from: prompts and decodes that nothing else
    on their worker slowed much."""
    first = shares.get(Stage.PREFILL) or shares[Stage.WHOLE]
    rest = shares.get(Stage.DECODE) or shares.get(Stage.WHOLE)
    if seen.prefill > 0 and not first.batch and not fleet.queue[first.slot]:
        yield PrefillStep(model, seen.uncached, seen.prompt - seen.uncached, seen.prefill)
    gaps = seen.tokens - 2
    if rest is None or gaps <= 0 or seen.decode <= 0:
        return
    busy = fleet.busy_of(now, rest.slot)
    if busy < MAX_BUSY_SHARE:
        batch = 1.0 + (rest.batch + max(0.0, float(fleet.decodes[rest.slot]))) / 2
        context = batch * (seen.prompt + seen.tokens / 2)
        yield DecodeStep(model, batch, context, seen.decode / gaps * (1.0 - busy))


def _lives(fleet: Fleet, share: Share, chosen: Candidate) -> bool:
    """Its slot is still the life that was chosen."""
    view = fleet.views[share.slot]
    plan = chosen.plan
    return view is not None and view.target in (plan.prefill, plan.decode, plan.whole)


def shares_of(
    chosen: Candidate, prompt_tokens: int, output: float, tpot: float = math.inf
) -> dict[Stage, Share]:
    """What a decision puts on its workers.

    Args:
        output: tokens that the completion is expected to take.
        tpot: its target per token, seconds.
    """
    first, rest = chosen.slots
    seconds = chosen.prefill_seconds
    if chosen.plan.whole is not None:
        return {Stage.WHOLE: Share(first, Stage.WHOLE, prompt_tokens, output, seconds, tpot=tpot)}
    shares = {Stage.PREFILL: Share(first, Stage.PREFILL, prompt_tokens, output, seconds)}
    if chosen.plan.decode is not None:
        shares[Stage.DECODE] = Share(rest, Stage.DECODE, prompt_tokens, output, tpot=tpot)
    return shares
