"""How long an engine's steps and transfers take. Pure; the planner's simulator uses it as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.config_models import SimulationConfig


@dataclass(frozen=True)
class Timing:
    """A step reads the weights, computes its prompt tokens, and reads its decodes' KV.

        step = base + a·Σ new + b·Σ new·(prefix + new/2) + c·batch + d·Σ context

    Attributes:
        base: seconds of a step with nothing in it.
        a: seconds per prompt token.
        b: seconds per pair of a prompt token and a token it attends to.
        c: seconds per decoding sequence.
        d: seconds per token of a decoding sequence's context.
        bytes_per_token: KV.
        bandwidth: bytes per second of a link.
        latency: seconds of a transfer's fixed part.
    """

    base: float
    a: float
    b: float
    c: float
    d: float
    bytes_per_token: int
    bandwidth: float
    latency: float

    @classmethod
    def of(cls, config: SimulationConfig) -> Timing:
        """The configured one, at its speed."""
        return cls(
            config.step_seconds / config.speed,
            config.prefill_token_seconds / config.speed,
            config.prefill_pair_seconds / config.speed,
            config.decode_sequence_seconds / config.speed,
            config.decode_token_seconds / config.speed,
            config.kv_bytes_per_token,
            config.link_bytes_per_second * config.speed,
            config.link_seconds / config.speed,
        )

    def step(
        self, chunks: Iterable[tuple[int, int]], decode_batch: int, decode_context: int
    ) -> float:
        """Seconds of one engine step.

        Args:
            chunks: (new tokens, tokens before them) of each prefill in the step.
            decode_context: tokens of all decoding sequences together.
        """
        seconds = self.base + self.c * decode_batch + self.d * decode_context
        for new, prefix in chunks:
            seconds += new * (self.a + self.b * (prefix + new / 2))
        return seconds

    def prefill(self, new: int, prefix: int, chunk: int) -> float:
        """Seconds to compute `new` tokens after `prefix` alone, in steps of `chunk` tokens."""
        steps = max(1, -(-new // chunk))
        return steps * self.base + new * (self.a + self.b * (prefix + new / 2))

    def handoff(self, tokens: int) -> float:
        """Seconds to move the KV of so many tokens over an idle link."""
        return self.latency + tokens * self.bytes_per_token / self.bandwidth
