"""One request as a client timed it, and the medians and ratios of many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One request. Seconds, on the client's clock, from the call.

    Attributes:
        ttft: until the first token was received.
        second: until the next message with tokens after it, from the first token.
        tpot: mean gap of all tokens after the first message.
        total: until the stream was closed.
        cached: prompt tokens that a prefix cache had.
        phases: the router's own, by name; none for a plain engine.
        handoff_bytes, transfer: KV that crossed, and its first byte to its last in seconds.
    """

    tokens: tuple[int, ...]
    ttft: float
    second: float
    tpot: float
    total: float
    cached: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    handoff_bytes: int = 0
    transfer: float = 0.0


class Stopwatch:
    """Starts when made; is told of every message with tokens."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._arrivals: list[tuple[float, int]] = []
        self._tokens: list[int] = []

    def saw(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._arrivals.append((time.perf_counter() - self._began, len(tokens)))
            self._tokens += tokens

    def sample(self, **fields: Any) -> Sample:
        """The request, ended now. Raises ValueError if no token came."""
        if not self._arrivals:
            raise ValueError("the request ended without a token")
        total = time.perf_counter() - self._began
        first, in_first = self._arrivals[0]
        last, _ = self._arrivals[-1]
        later = len(self._tokens) - in_first
        return Sample(
            tokens=tuple(self._tokens),
            ttft=first,
            second=self._arrivals[1][0] - first if later else 0.0,
            tpot=(last - first) / later if later else 0.0,
            total=total,
            **fields,
        )


def latency_row(prompt: int, cluster: Sequence[Sample], vllm: Sequence[Sample]) -> dict[str, Any]:
    """Medians in milliseconds, with the least and the most; ratios are of the medians."""
    row: dict[str, Any] = {"concurrency": 1, "prompt_tokens": prompt, "runs": len(cluster)}
    for name in ("ttft", "second", "tpot", "total"):
        both = []
        for system, samples in (("cluster", cluster), ("vllm", vllm)):
            values = [1000 * float(getattr(sample, name)) for sample in samples]
            both.append(median(values))
            row[f"{name}_{system}_ms"] = both[-1]
            row[f"{name}_{system}_range_ms"] = [min(values), max(values)]
        row[f"{name}_ratio"] = _ratio(*both)
    for name in cluster[0].phases:
        row[f"{name}_ms"] = 1000 * median(sample.phases[name] for sample in cluster)
    row["transfer_ms"] = 1000 * median(sample.transfer for sample in cluster)
    row["handoff_bytes"] = int(median(sample.handoff_bytes for sample in cluster))
    pairs = list(zip(cluster, vllm, strict=True))
    row["same_tokens"] = sum(one.tokens == other.tokens for one, other in pairs)
    row["cold"] = not any(sample.cached for pair in pairs for sample in pair)
    return row


@dataclass(frozen=True)
class Load:
    """A closed loop: `samples` of requests, all done in `seconds`."""

    seconds: float
    samples: tuple[Sample, ...]

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return sum(len(sample.tokens) for sample in self.samples) / self.seconds


def load_row(
    prompt: int, concurrency: int, cluster: Sequence[Load], vllm: Sequence[Load]
) -> dict[str, Any]:
    """Medians over the rounds: output tokens per second, and the requests' TTFT and TPOT in ms."""
    row: dict[str, Any] = {
        "concurrency": concurrency,
        "prompt_tokens": prompt,
        "rounds": len(cluster),
        "requests_per_round": len(cluster[0].samples),
    }
    for system, loads in (("cluster", cluster), ("vllm", vllm)):
        rates = [load.rate for load in loads]
        row[f"tokens_per_second_{system}"] = median(rates)
        row[f"tokens_per_second_{system}_range"] = [min(rates), max(rates)]
        samples = [sample for load in loads for sample in load.samples]
        row[f"ttft_{system}_ms"] = 1000 * median(sample.ttft for sample in samples)
        row[f"tpot_{system}_ms"] = 1000 * median(sample.tpot for sample in samples)
    for name in ("tokens_per_second", "ttft", "tpot"):
        unit = "" if name == "tokens_per_second" else "_ms"
        row[f"{name}_ratio"] = _ratio(row[f"{name}_cluster{unit}"], row[f"{name}_vllm{unit}"])
    return row


def _ratio(cluster: float, vllm: float) -> float | None:
    """None where vLLM's is 0, as the gap after a single token is."""
    return cluster / vllm if vllm else None
