"""What one worker takes: seconds of a prefill, of a decode step, of a mixed step, of a handoff.

All four are linear in what they process, piecewise where the hardware's limit changes. The same
form holds a roofline, a fitted profile, and the tables published for DistServe; and a run of decode
steps has a closed form, which is what makes the simulator fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class PrefillCost:
    """Seconds of a prefill step: max(floor, base + per_token·Σnew + per_pair·Σ(total² − cached²)).

    Attributes:
        floor: no step is shorter: the weights are read once.
        once: on top, for each prompt that the step begins: what wakes up for it, and its handoff.
    """

    base: float
    per_token: float
    per_pair: float = 0.0
    floor: float = 0.0
    once: float = 0.0


@dataclass(frozen=True)
class Launch:
    """What an engine that plans ahead takes to start a step of prompts, on the one thread that
    also looks at outcomes.

    Attributes:
        graph_tokens: steps of no more are replayed from CUDA graphs; 0: none is.
        within, beyond: seconds, of those and of larger ones.
        next_within, next_beyond: the same of steps that are started behind another: an engine that
            is at work is quicker; 0: not known, and as long.
    """

    graph_tokens: int
    within: float
    beyond: float
    next_within: float = 0.0
    next_beyond: float = 0.0

    def seconds(self, tokens: int, behind: bool = False) -> float:
        """To start a step of so many new tokens, `behind` one that is not told yet."""
        if tokens <= self.graph_tokens:
            return (behind and self.next_within) or self.within
        return (behind and self.next_beyond) or self.beyond

    def scaled(self, factor: float) -> Launch:
        return Launch(
            self.graph_tokens,
            *(x * factor for x in (self.within, self.beyond, self.next_within, self.next_beyond)),
        )


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of a decode step: base + per_context·Σcontext + per_sequence·batch."""

    base: float
    per_context: float
    per_sequence: float = 0.0


@dataclass(frozen=True)
class HandoffCost:
    """Seconds of a KV handoff: latency + bytes/bandwidth, most of it hidden behind the prefill.

    Attributes:
        layers: the last layer's blocks can only leave once the prefill is done.
    """

    latency: float
    bandwidth: float
    layers: int = 1


@dataclass(frozen=True)
class Contention:
    """What workers on the same cores take from each other; nothing where each has its own.

    Attributes:
        prefill, decode: how many times as long a step of either kind takes while another worker's
            step is under way.
        dispatch: the same of a request's way to its first token, outside of the steps.
        handoff: seconds that decode's steps lose when a prompt ends: its first token's way out and
            its handoff run on their cores, and in their process.
    """

    prefill: float = 1.0
    decode: float = 1.0
    dispatch: float = 1.0
    handoff: float = 0.0

    def slowed(self, step: StepKind) -> float:
        """The factor of that kind of step."""
        return self.prefill if step == "prefill" else self.decode


@dataclass(frozen=True)
class Performance:
    """One worker: a model on its hardware, in its parallel layout.

    Attributes:
        decode: costs below `large_batch` sequences, and from there on.
        kv_bytes_per_token: of all its layers.
        kv_capacity: tokens its cache holds.
        gpus: that one worker takes.
        dispatch: seconds to a request's first token that no step takes: the ways between router and
            engine.
        contention: with the other workers, all of which then share one host.
        chunk: tokens that one step computes: longer prompts take several; 0: whatever they are.
        launch: of an engine that plans its steps ahead; no step of prompts is shorter.
        label: what it describes, for reports.
    """

    prefill: PrefillCost
    decode: DecodeCost
    decode_large: DecodeCost
    large_batch: int
    handoff: HandoffCost
    kv_bytes_per_token: float
    kv_capacity: int
    gpus: int = 1
    label: str = ""
    dispatch: float = 0.0
    contention: Contention = Contention()
    chunk: int = 0
    launch: Launch | None = None
    whole: Performance | None = None

    def prefill_seconds(self, new: int, cached: int = 0) -> float:
        """One prompt alone, in as many steps as it takes: `new` tokens after `cached` ones."""
        cost, steps = self.prefill, self.prefill_steps(new)
        tokens = cost.per_token * new + cost.per_pair * new * (new + 2 * cached)
        least = max(cost.floor, self._launch_seconds(math.ceil(new / steps)))
        return cost.once + max(least * steps, cost.base * steps + tokens)

    def prefill_steps(self, new: int) -> int:
        """In how many steps so many tokens are computed."""
        return math.ceil(new / self.chunk) if self.chunk and new else 1

    def prefill_batch_seconds(self, prompts: Iterable[tuple[int, int]]) -> float:
        """Several prompts, or chunks of them, in one step: (new, cached or computed before)."""
        chunks = tuple(prompts)
        return max(
            self.prefill.floor,
            self._launch_seconds(sum(new for new, _ in chunks)),
            self.computing_seconds(chunks),
        )

    def computing_seconds(self, prompts: Iterable[tuple[int, int]]) -> float:
        """The same of the device alone, which computes a step while the next one is launched."""
        cost, tokens, pairs = self.prefill, 0, 0
        for new, cached in prompts:
            tokens += new
            pairs += new * (new + 2 * cached)
        return cost.base + cost.per_token * tokens + cost.per_pair * pairs

    def _launch_seconds(self, tokens: int) -> float:
        return self.launch.seconds(tokens) if self.launch else 0.0

    def decode_cost(self, batch: int) -> DecodeCost:
        """The costs that hold at this batch size."""
        return self.decode if batch < self.large_batch else self.decode_large

    def decode_seconds(self, batch: int, context: float) -> float:
        """One step for `batch` sequences that hold `context` tokens together."""
        if batch == 0:
            return 0.0
        cost = self.decode_cost(batch)
        return cost.base + cost.per_context * context + cost.per_sequence * batch

    def mixed_seconds(
        self, prompts: Iterable[tuple[int, int]], batch: int, context: float
    ) -> float:
        """A chunked-prefill step: prompts' chunks and a decode batch share the linear layers.

        The weights are read once for all; attention over the decodes' context comes on top.
        """
        chunks = tuple(prompts)
        if not chunks:
            return self.decode_seconds(batch, context)
        if batch == 0:
            return self.prefill_batch_seconds(chunks)
        cost = self.decode_cost(batch)
        linear = self.prefill_batch_seconds(chunks) + self.prefill.per_token * batch
        weights = cost.base + cost.per_sequence * batch
        return max(linear, weights) + cost.per_context * context

    def handoff_seconds(self, tokens: int) -> float:
        """The whole of a handoff of `tokens` tokens' KV."""
        return self.handoff.latency + tokens * self.kv_bytes_per_token / self.handoff.bandwidth

    def exposed_handoff_seconds(self, tokens: int, hidden_behind: float) -> float:
        """What is left of it when a prefill of `hidden_behind` seconds ends."""
        copy = tokens * self.kv_bytes_per_token / self.handoff.bandwidth
        return self.handoff.latency + max(copy - hidden_behind, copy / self.handoff.layers)

    def scaled(self, prefill: float = 1.0, decode: float = 1.0) -> Performance:
        """The same worker with its measured speed: factors on the seconds."""
        return replace(
            self,
            prefill=PrefillCost(
                self.prefill.base * prefill,
                self.prefill.per_token * prefill,
                self.prefill.per_pair * prefill,
                self.prefill.floor * prefill,
                self.prefill.once * prefill,
            ),
            launch=self.launch and self.launch.scaled(prefill),
            decode=_scaled(self.decode, decode),
            decode_large=_scaled(self.decode_large, decode),
            whole=self.whole and self.whole.scaled(prefill, decode),
        )


def across(prefill: Performance, decode: Performance) -> Performance:
    """Pools whose workers differ: prompts on the one kind, decodes and their KV on the other.

    Aggregated, a worker of either kind counts as one that has the slower steps of both.
    """
    if prefill == decode:
        return prefill
    handoff = max(prefill.handoff, decode.handoff, key=lambda cost: 1 / cost.bandwidth)
    label = f"{prefill.label}; decode: {decode.label}"
    split = replace(
        prefill,
        decode=decode.decode,
        decode_large=decode.decode_large,
        large_batch=decode.large_batch,
        kv_capacity=decode.kv_capacity,
        handoff=handoff,
        label=label,
    )
    prompts = max(prefill, decode, key=lambda worker: worker.prefill_seconds(_USUAL))
    steps = max(prefill, decode, key=lambda worker: worker.decode_seconds(_BATCH, _BATCH * _USUAL))
    whole = replace(
        split,
        prefill=prompts.prefill,
        decode=steps.decode,
        decode_large=steps.decode_large,
        large_batch=steps.large_batch,
        kv_capacity=min(prefill.kv_capacity, decode.kv_capacity),
    )
    return replace(split, whole=whole)


_USUAL, _BATCH = 1024, 16
"""Tokens and sequences by which the slower of two workers is told."""


def _scaled(cost: DecodeCost, by: float) -> DecodeCost:
    return DecodeCost(cost.base * by, cost.per_context * by, cost.per_sequence * by)
