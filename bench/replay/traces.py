"""Recorded traffic: when a request came, how long it was, what it shared with others."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from cluster.prefix import Hashes, mixed

BLOCK = 512
"""Tokens; the block of Mooncake's trace."""


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
        at: seconds after the first.
        names: of its prompt's full blocks; empty where the trace does not tell what is shared.
    """

    at: float
    prompt: int
    output: int
    names: Hashes


NO_NAMES: Hashes = np.zeros(0, dtype=np.uint64)


def azure(path: Path, count: int) -> list[Arrival]:
    with path.open() as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Arrival(
            at - times[0],
            max(2, int(row["ContextTokens"])),
            max(2, int(row["GeneratedTokens"])),
            NO_NAMES,
        )
        for at, row in zip(times, rows, strict=True)
    ]


def mooncake(path: Path, count: int) -> list[Arrival]:
    """Its stamps are quantised to 3 s, and are spread over them."""
    rng = random.Random(1)
    arrivals = []
    with path.open() as file:
        for line, _ in zip(file, range(count), strict=False):
            row = json.loads(line)
            # Its ids are hashes of a block and all before it already.
            full = row["hash_ids"][: row["input_length"] // BLOCK]
            names = mixed(np.array(full, dtype=np.uint64) + np.uint64(1))
            at = row["timestamp"] / 1000 + rng.uniform(0, 3)
            arrivals.append(Arrival(at, row["input_length"], max(2, row["output_length"]), names))
    return sorted(arrivals, key=lambda a: a.at)


def at_rate(arrivals: list[Arrival], per_second: float) -> list[Arrival]:
    """The same arrivals, faster or slower."""
    factor = (len(arrivals) / per_second) / arrivals[-1].at
    return [Arrival(a.at * factor, a.prompt, a.output, a.names) for a in arrivals]


@dataclass(frozen=True)
class Trace:
    """A trace and the cluster it is replayed on.

    Attributes:
        pools: prefill and decode workers.
        ttft, tpot: targets, seconds.
    """

    name: str
    file: str
    read: Callable[[Path, int], list[Arrival]]
    count: int
    pools: tuple[int, int]
    ttft: float
    tpot: float


TRACES = (
    Trace("azure-code", "AzureLLMInferenceTrace_code.csv", azure, 1500, (6, 2), 2.0, 0.025),
    Trace("azure-conv", "AzureLLMInferenceTrace_conv.csv", azure, 1500, (4, 4), 1.0, 0.025),
    Trace("mooncake", "mooncake_conversation_trace.jsonl", mooncake, 1200, (6, 2), 8.0, 0.025),
)
