"""What a session found. Milliseconds, GiB/s and MiB; medians over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.gpu.timing import Request
from bench.handoff.link_rate import LinkRate

MIB = 1 << 20
NEAR_TIE_NATS = 0.05


@dataclass(frozen=True)
class RawSend:
    """A plain NCCL send of as many bytes as a prompt's KV has."""

    prompt: int
    mib: float
    ms: float
    gib_per_s: float


@dataclass(frozen=True)
class Handoff:
    """Medians over some handoffs of one prompt length.

    Attributes:
        transfer_ms: grant to the last byte landed and verified.
        exposed_ms: first token to the end of the handoff.
        overlap: share of grant to end before the first token, 0 to 1.
    """

    mib: float
    transfer_ms: float
    gib_per_s: float
    exposed_ms: float
    overlap: float

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Handoff | None:
        crossings = [r.crossing for r in requests if r.crossing is not None]
        if not crossings:
            return None
        return cls(
            median(c.bytes for c in crossings) / MIB,
            1000 * median(c.seconds for c in crossings),
            median(c.gib_per_second for c in crossings),
            1000 * median(c.exposed for c in crossings),
            median(c.overlap for c in crossings),
        )


@dataclass(frozen=True)
class Latency:
    """One system at one prompt length.

    Attributes:
        second_ms, step_ms: None where too few tokens were asked for.
        cached: runs that found part of the prompt in a prefix cache.
    """

    system: str
    prompt: int
    runs: int
    ttft_ms: float
    ttft_least_ms: float
    ttft_most_ms: float
    second_ms: float | None
    step_ms: float | None
    cached: int
    handoff: Handoff | None

    @classmethod
    def of(cls, system: str, prompt: int, requests: Sequence[Request]) -> Latency:
        ttfts = [1000 * r.ttft for r in requests]
        seconds = [1000 * r.second for r in requests if r.second is not None]
        steps = [1000 * r.step for r in requests if r.step is not None]
        return cls(
            system, prompt, len(requests), median(ttfts), min(ttfts), max(ttfts),
            median(seconds) if seconds else None, median(steps) if steps else None,
            sum(r.cached > 0 for r in requests), Handoff.of(requests),
        )  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Decode steps of a full batch, with and without KV coming in.

    Attributes:
        quiet_ms, receiving_ms: mean step, median over the rounds; receiving: steps that overlap a
            handoff, from reservation to end.
        slowdown: median over the rounds of receiving / quiet, less 1.
        whole_slowdown: the same of all steps of a round with handoffs, so also of those in which
            the handed-off requests themselves were computed.
        receiving_steps: how many steps overlapped a handoff.
    """

    system: str
    batch: int
    context: int
    rounds: int
    quiet_ms: float
    receiving_ms: float
    slowdown: float
    whole_slowdown: float
    receiving_steps: int
    handoffs: int
    mib: float


@dataclass(frozen=True)
class Exact:
    """A split's tokens against one engine's.

    Attributes:
        same: leading tokens that are equal, of `tokens`.
        gap_nats: where they part, how much likelier the one engine's token was to it than the next
            best; None if they do not part, or it was not asked.
        reshaped: the sides split the model differently, so their sums round differently and a near
            tie may fall either way; otherwise nothing excuses another token.
    """

    pair: str
    against: str
    prompt: int
    sampling: str
    tokens: int
    same: int
    gap_nats: float | None
    reshaped: bool = False

    @property
    def exact(self) -> bool:
        return self.same == self.tokens

    @property
    def excused(self) -> bool:
        return self.reshaped and self.gap_nats is not None and self.gap_nats <= NEAR_TIE_NATS


@dataclass(frozen=True)
class SameBlocks:
    """The KV blocks of a prompt on both sides after its handoff; of those that decode has not
    written to itself.

    Attributes:
        compared: layers times blocks.
        differing: of those, and `first` the earliest, as "layer, block of the prompt".
    """

    pair: str
    prompt: int
    sampling: str
    transport: str
    compared: int
    differing: int
    first: str


@dataclass(frozen=True)
class Control:
    """That the outputs could have shown damage: another first block gives other tokens."""

    prompt: int
    differs: bool


@dataclass(frozen=True)
class Ledger:
    """What an engine held when everything had ended."""

    engine: str
    entries: int
    blocks: int


@dataclass(frozen=True)
class Missing:
    """What could not be measured, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class AgentSend:
    """The KV of a prompt from one agent to another, all of it there from the beginning and no
    engine beside: gather, checksums, transfer, scatter.
    """

    prompt: int
    took: LinkRate


@dataclass
class Results:
    """Filled section by section.

    Attributes:
        about: date, machine, command and settings, in words.
        unhidden: handoffs of prompts that prefill had in its cache: only the step of their last
            block is beside them.
        agents: handoffs without engines, so that nothing at all hides them.
    """

    about: dict[str, str] = field(default_factory=dict)
    raw: list[RawSend] = field(default_factory=list)
    agents: list[AgentSend] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    unhidden: list[Latency] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    exact: list[Exact] = field(default_factory=list)
    blocks: list[SameBlocks] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def find(self, system: str, prompt: int) -> Latency | None:
        return _find(self.latency, system, prompt)

    def find_unhidden(self, system: str, prompt: int) -> Handoff | None:
        row = _find(self.unhidden, system, prompt)
        return row.handoff if row else None

    def find_raw(self, prompt: int) -> RawSend | None:
        return next((row for row in self.raw if row.prompt == prompt), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _find(rows: Sequence[Latency], system: str, prompt: int) -> Latency | None:
    return next((row for row in rows if (row.system, row.prompt) == (system, prompt)), None)
