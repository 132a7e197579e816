"""How a completion goes on after its worker was lost, without a token lost, repeated or changed.

    CONTINUE  prompt and sent tokens are computed as one prompt, and the next token is sampled
    REPEAT    all is generated anew, and what comes is checked against what was sent
    None      neither would be exact

Continuing needs nothing that an engine keeps besides the tokens themselves: not the state of a
seeded generator, a grammar or a stop string that may have begun, nor counts of output tokens, which
presence and frequency penalties have (the repetition penalty counts prompt and output alike).
Repeating needs the same tokens to come again: greedy or seeded sampling.
"""

from __future__ import annotations

from enum import Enum

from router.generation import Sampling


class Replay(Enum):
    """What is asked of the next worker."""

    CONTINUE = "continue"
    REPEAT = "repeat"


def how(sampling: Sampling, sent_tokens: int, settled: bool) -> Replay | None:
    """The way for a completion of which so many tokens were sent; continuing is the quicker one.

    Args:
        settled: the sent tokens end with a whole character: no text of theirs is still to come.
    """
    if sent_tokens == 0:
        return Replay.REPEAT
    if settled and not _kept_by_the_engine(sampling):
        return Replay.CONTINUE
    return Replay.REPEAT if sampling.replayable else None


def why_not(sampling: Sampling) -> str:
    """What stands against both ways, in words."""
    reasons = _kept_by_the_engine(sampling) or ["half a character"]
    return f"it was sampled without a seed, under {' and '.join(reasons)}"


def _kept_by_the_engine(sampling: Sampling) -> list[str]:
    """What an engine knows of a running completion besides its tokens."""
    seeded = sampling.replayable and sampling.temperature != 0
    kept = {
        "a seed": seeded,
        "a guide": sampling.guide is not None,
        "stop strings": bool(sampling.stop),
        "a presence penalty": bool(sampling.presence_penalty),
        "a frequency penalty": bool(sampling.frequency_penalty),
    }
    return [name for name, given in kept.items() if given]
