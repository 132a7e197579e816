"""Reads traces: Azure's CSV, Mooncake's JSON lines, and our own request log.

Every reader says what is wrong with a line, by its number, and what was expected; none guesses.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest
from cluster.simulator.workload import Arrival

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_JITTER_SECONDS = 3.0
"""Its stamps are whole multiples of this: without a jitter all of a multiple's arrivals clump."""


@dataclass(frozen=True)
class Trace:
    """What a file held.

    Attributes:
        arrivals: by time, the first at 0.
        unsorted: lines that came before the line ahead of them; they were sorted in.
    """

    name: str
    arrivals: tuple[Arrival, ...]
    unsorted: int = 0


def read_trace(path: Path, max_model_len: int, seed: int = 0) -> Trace:
    """Reads any of the three formats; which one is told from the first line.

    Args:
        max_model_len: prompt and output tokens that the model takes.
        seed: of Mooncake's jitter.

    Raises:
        InvalidRequest: names the line and what is wrong with it, or says that there are too few.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            arrivals = list(_parse(path, first, lines, seed))
    except OSError as error:
        raise InvalidRequest("trace", f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("trace", f"{path} is not text: {error.reason}") from error
    return checked(path.name, arrivals, max_model_len)


def checked(name: str, arrivals: list[tuple[int, Arrival]], max_model_len: int) -> Trace:
    """Sorts numbered arrivals, moves the first to 0, and refuses what no cluster can serve."""
    if len(arrivals) < 2:
        found = "is empty" if not arrivals else "has one request"
        raise InvalidRequest("trace", f"{name} {found}; two are the least that have a rate")
    for number, arrival in arrivals:
        if arrival.prompt < 1 or arrival.output < 1:
            raise _wrong(name, number, "prompt and output lengths must be at least 1")
        if arrival.prompt + arrival.output > max_model_len:
            raise _wrong(
                name,
                number,
                f"{arrival.prompt} + {arrival.output} tokens are over the model's "
                f"{max_model_len}; drop such requests or take a longer model",
            )
    unsorted = sum(after.at < before.at for (_, before), (_, after) in pairwise(arrivals))
    ordered = sorted((arrival for _, arrival in arrivals), key=lambda each: each.at)
    start = ordered[0].at
    if ordered[-1].at == start:
        raise InvalidRequest("trace", f"{name}: all requests come at once; there is no rate")
    return Trace(name, tuple(replace(a, at=a.at - start) for a in ordered), unsorted)


def _parse(
    path: Path, first: str, lines: Iterable[str], seed: int
) -> Iterator[tuple[int, Arrival]]:
    text = first.strip()
    if not text:
        return iter(())
    if text.startswith("{"):
        rng = random.Random(seed)
        return _json_lines(path.name, lines, rng)
    if text.split(",")[0].strip() == AZURE_COLUMNS[0]:
        return _azure(path.name, lines)
    raise InvalidRequest(
        "trace",
        f"{path.name} starts with {text[:60]!r}; known are Azure's CSV "
        f"({','.join(AZURE_COLUMNS)}), Mooncake's JSON lines (timestamp, input_length, "
        "output_length, hash_ids) and `pdserve record`'s (at, prompt, output, blocks)",
    )


def _azure(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Arrival]]:
    reader = csv.DictReader(lines)
    columns = tuple(reader.fieldnames or ())
    if missing := [c for c in AZURE_COLUMNS if c not in columns]:
        raise _wrong(name, 1, f"has no column {', '.join(missing)}")
    if unknown := [c for c in columns if c not in AZURE_COLUMNS]:
        raise _wrong(name, 1, f"has the unknown column {', '.join(map(repr, unknown))}")
    for row in reader:
        number = reader.line_num
        try:
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        except (ValueError, TypeError) as error:
            raise _wrong(name, number, f"TIMESTAMP: {error}") from None
        prompt = _count(name, number, "ContextTokens", row["ContextTokens"])
        output = _count(name, number, "GeneratedTokens", row["GeneratedTokens"])
        yield number, Arrival(stamp, prompt, output)


def _json_lines(
    name: str, lines: Iterable[str], rng: random.Random
) -> Iterator[tuple[int, Arrival]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise _wrong(name, number, f"is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise _wrong(name, number, "is not an object")
        read = _mooncake if "input_length" in values else _own
        yield number, read(name, number, values, rng)


_MOONCAKE = {"timestamp", "input_length", "output_length", "hash_ids"}
_OWN = {"at", "prompt", "output", "blocks", "block_tokens", "kind"}


def _mooncake(name: str, number: int, values: dict[str, Any], rng: random.Random) -> Arrival:
    _known(name, number, values, _MOONCAKE)
    stamp = _number(name, number, "timestamp", values.get("timestamp")) / 1000.0
    return Arrival(
        stamp + rng.uniform(0.0, MOONCAKE_JITTER_SECONDS),
        _count(name, number, "input_length", values["input_length"]),
        _count(name, number, "output_length", values.get("output_length")),
        _hashes(name, number, "hash_ids", values.get("hash_ids", [])),
        MOONCAKE_BLOCK_TOKENS,
    )


def _own(name: str, number: int, values: dict[str, Any], _: random.Random) -> Arrival:
    _known(name, number, values, _OWN)
    return Arrival(
        _number(name, number, "at", values.get("at")),
        _count(name, number, "prompt", values.get("prompt")),
        _count(name, number, "output", values.get("output")),
        _hashes(name, number, "blocks", values.get("blocks", [])),
        _count(name, number, "block_tokens", values.get("block_tokens", 512)),
        str(values.get("kind", "")),
    )


def _known(name: str, number: int, values: dict[str, Any], fields: set[str]) -> None:
    if unknown := sorted(values.keys() - fields):
        known = ", ".join(sorted(fields))
        raise _wrong(name, number, f"has the unknown field {unknown[0]!r}; known: {known}")


def _count(name: str, number: int, field: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise _wrong(name, number, f"{field} is {value!r}, not a whole number of at least 0")


def _number(name: str, number: int, field: str, value: Any) -> float:
    number_like = isinstance(value, int | float) and not isinstance(value, bool)
    if number_like and math.isfinite(value) and value >= 0:
        return float(value)
    raise _wrong(name, number, f"{field} is {value!r}, not a finite number of at least 0")


def _hashes(name: str, number: int, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
        raise _wrong(name, number, f"{field} is not a list of whole numbers")
    return tuple(value)


def _wrong(name: str, number: int, what: str) -> InvalidRequest:
    return InvalidRequest("trace", f"{name}, line {number}: {what}")
