"""What `pdserve bench` asks for: when requests come, their lengths and their tokens. Pure."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import InvalidRequest
from cluster.simulator.workload import Arrival

CLASSES = ("interactive", "standard", "batch")
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
"""Unless they are asked for otherwise, or the model takes less."""


@dataclass(frozen=True)
class Lengths:
    """Tokens, drawn evenly from `least` to `most`."""

    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"


def parse_lengths(field: str, text: str) -> Lengths:
    """`512`, or `256-1024`. Raises InvalidRequest."""
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text.strip())
    if match is not None:
        least, most = int(match[1]), int(match[2] or match[1])
        if 1 <= least <= most:
            return Lengths(least, most)
    raise InvalidRequest(field, f"{text!r} is neither a number of tokens nor LEAST-MOST")


def parse_rates(text: str) -> tuple[float, ...]:
    """`4`, or `2,4,8`: requests a second, ascending. Raises InvalidRequest."""
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise InvalidRequest("rate", f"{text!r} is no rate, nor several: --rate 2,4,8")
    return rates


@dataclass(frozen=True)
class Shape:
    """Of the requests that are made up.

    Attributes:
        shared: of a prompt's tokens, so many first ones are the same in all.
    """

    prompt: Lengths
    output: Lengths
    shared: int = 0

    def check(self, max_model_len: int) -> None:
        """Raises InvalidRequest where it cannot be asked for; 0: the model has no known limit."""
        if self.shared >= self.prompt.least:
            raise InvalidRequest(
                "shared-prefix", f"{self.shared} tokens leave nothing of {self.prompt.least}"
            )
        if max_model_len and self.prompt.most + self.output.most > max_model_len:
            raise InvalidRequest(
                "prompt-tokens",
                f"{self.prompt.most} + {self.output.most} tokens are over the model's "
                f"{max_model_len}",
            )

    def __str__(self) -> str:
        shared = f" ({self.shared} of them shared)" if self.shared else ""
        return f"prompts of {self.prompt}{shared}, answers of {self.output} tokens"


def default_lengths(
    prompt: Lengths | None, output: Lengths | None, max_model_len: int
) -> tuple[Lengths, Lengths]:
    """What was given, and what fits the model in place of what was not."""
    room = max_model_len or math.inf
    if output is None:
        left = room - (prompt.most if prompt else 1)
        output = _one(min(OUTPUT_TOKENS, left if prompt else left / 4))
    if prompt is None:
        prompt = _one(min(PROMPT_TOKENS, room - output.most))
    return prompt, output


def _one(tokens: float) -> Lengths:
    return Lengths(max(1, int(tokens)), max(1, int(tokens)))


def drawn(shape: Shape, seed: int) -> Iterator[Arrival]:
    """Requests without end, all of them at 0: for a closed loop."""
    rng = random.Random(seed)
    while True:
        yield Arrival(0.0, shape.prompt.draw(rng), shape.output.draw(rng))


def arriving(shape: Shape, rate: float, burstiness: float, seed: int) -> Iterator[Arrival]:
    """Requests without end whose gaps have a gamma distribution.

    Args:
        rate: requests a second, on average.
        burstiness: the gaps' variance over their mean squared: 1 is a Poisson process, more comes
            in bursts, 0 keeps equal distances.
    """
    gaps = random.Random(f"gaps {seed}")
    at = 0.0
    for asked in drawn(shape, seed):
        if burstiness > 0:
            at += gaps.gammavariate(1 / burstiness, burstiness / rate)
        else:
            at += 1 / rate
        yield replace(asked, at=at)


def sped(arrivals: Sequence[Arrival], speed: float) -> Iterator[Arrival]:
    """A trace, `speed` times as fast."""
    return (replace(each, at=each.at / speed) for each in arrivals)


class Prompts:
    """Token ids, the same for the same seed.

    Args:
        vocab: ids are 1 to `vocab` - 1.
        shared: so many first ones are the same in all prompts whose blocks are not known.
    """

    def __init__(self, vocab: int, seed: int, shared: int = 0) -> None:
        self._vocab = max(2, vocab)
        self._seed = seed
        self._shared = self._ids(shared, 0)

    def ids(self, asked: Arrival, number: int) -> list[int]:
        """The `number`th request's prompt: its trace's blocks, alike where their hashes are, or the
        shared prefix, and then what no other prompt has."""
        known = self._shared
        if asked.blocks:
            known = []
            for block in asked.blocks[: -(-asked.prompt // asked.block_tokens)]:
                known += self._ids(asked.block_tokens, 1, block & 0xFFFF_FFFF_FFFF_FFFF)
        known = known[: asked.prompt]
        return known + self._ids(asked.prompt - len(known), 2, number)

    def _ids(self, count: int, *of: int) -> list[int]:
        rng = np.random.default_rng((self._seed, *of))
        ids: list[int] = rng.integers(1, self._vocab, count).tolist()
        return ids
