"""One try to serve a completion: the workers' parts, and what of it they began with. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import PdserveError
from router.events import Output
from router.output import Stage
from router.placement import Plan, Target
from router.tokens import Source


@dataclass(slots=True)
class Leg:
    """One worker's part; ended when it sent its last output or failed."""

    worker: Target
    source: Source = field(default_factory=Source)
    ended: bool = False


@dataclass(slots=True)
class Attempt:
    """One try.

    Attributes:
        base: tokens of the completion that were part of the prompt; workers count after them.
        sent_before: tokens that the client had when it began.
        decode_error: decode's failure while prefill has yet to answer.
        held: what decode has sent meanwhile, if that needs prefill's answer before it.
    """

    sequence_id: str = ""
    legs: dict[Stage, Leg] = field(default_factory=dict)
    base: int = 0
    sent_before: int = 0
    decode_error: PdserveError | None = None
    held: list[Output] = field(default_factory=list)

    def leg(self, sequence_id: str, stage: Stage) -> Leg | None:
        """The part that is still going on; None if it is of another attempt or has ended."""
        leg = self.legs.get(stage) if sequence_id == self.sequence_id else None
        return None if leg is None or leg.ended else leg

    def end(self) -> list[Leg]:
        """Ends it; returns the parts that were still going on."""
        open_legs = [leg for leg in self.legs.values() if not leg.ended]
        for leg in open_legs:
            leg.ended = True
        return open_legs


def legs(plan: Plan, base: Source) -> dict[Stage, Leg]:
    """Prefill comes first: the first token waits for it, and decode has its blocks long before
    there is KV to take."""
    workers = {
        Stage.PREFILL: plan.prefill,
        Stage.DECODE: plan.decode,
        Stage.WHOLE: plan.whole,
    }
    return {
        stage: Leg(worker, Source(base.tokens, base.chars))
        for stage, worker in workers.items()
        if worker is not None
    }
