"""What a virtual worker works on: one stage of one sequence."""

from __future__ import annotations

from router.output import Stage
from router.placement import Target


class Attempt:
    """One try at a request: its jobs by stage, and where they are.

    Attributes:
        over: the router has given it up, or it is done: what its jobs still do counts for nothing.
    """

    __slots__ = ("index", "jobs", "over", "sequence_id", "targets")

    def __init__(self, index: int, sequence_id: str) -> None:
        self.index = index
        self.sequence_id = sequence_id
        self.jobs: dict[Stage, Job] = {}
        self.targets: dict[Stage, Target] = {}
        self.over = False


class Job:
    """A sequence on one worker.

    Attributes:
        remaining: prompt tokens to compute, set when it is first scheduled.
        computed: prompt tokens computed or found in the cache.
        last_step: the worker's step counter when its last token is there.
        planned: tokens of the remaining ones that are in steps under way.
        reserved: tokens of KV it holds.
        prefill_seconds: of the step in which its prefill ended.
    """

    __slots__ = (
        "attempt",
        "blocks",
        "cached",
        "cancelled",
        "computed",
        "grant_at",
        "landing",
        "last_step",
        "output",
        "planned",
        "prefill_seconds",
        "prompt",
        "remaining",
        "reserved",
        "scheduled_at",
        "stage",
    )

    def __init__(
        self,
        attempt: Attempt,
        stage: Stage,
        prompt: int,
        output: int,
        blocks: tuple[int, ...] = (),
    ) -> None:
        self.attempt = attempt
        self.stage = stage
        self.prompt = prompt
        self.output = output
        self.blocks = blocks
        self.remaining = prompt
        self.computed = 0
        self.planned = 0
        self.cached = 0
        self.reserved = 0
        self.last_step = 0
        self.scheduled_at: float | None = None
        self.prefill_seconds = 0.0
        self.grant_at: float | None = None
        self.landing = False
        self.cancelled = False

    @property
    def kv_tokens(self) -> int:
        """What it comes to hold at its end: reserved as a whole when it starts."""
        return self.prompt if self.stage is Stage.PREFILL else self.prompt + self.output
