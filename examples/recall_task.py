"""Seeded cases for the task that the bundled ``recall-tiny`` model has learnt.

A case is a ledger of codes, one ``adjective-noun: 123456`` line for each key, then a
question about one or more of the keys.  The asked keys can stand anywhere in the ledger, so a
right answer needs every part of a long prompt to be intact: a lost, swapped or damaged
piece of the prompt's attention state shows as a wrong digit.

The module is plain Python with no dependency.  The same random generator state always gives
the same case, so training, tests and demos can name a case by its seed::

    case = make_case(random.Random(7), n_facts=40)
    case.prompt      # "Here are the codes:\\namber-falcon: 482175\\n..."
    case.answer      # "482175"
    case.messages()  # the same case for a chat endpoint
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ADJECTIVES: tuple[str, ...] = tuple(
    """
    amber ancient azure bold brave bright bronze calm clever coral cosmic crimson
    crystal curious daring eager early emerald fancy gentle golden grand happy hidden
    humble icy indigo ivory jolly keen lively lucky lunar mellow misty noble
    olive proud quiet rapid rustic scarlet silent silver solar swift velvet wild
    """.split()  # noqa: SIM905
)
"""First halves of the keys; each is one token of the model's tokenizer."""

NOUNS: tuple[str, ...] = tuple(
    """
    anchor badger beacon bridge canyon castle cedar comet condor desert dolphin eagle
    ember falcon forest garden glacier harbor hawk island jaguar kestrel lagoon lantern
    lynx maple meadow meteor mountain nebula ocean orchid otter panda pebble planet
    prairie raven river rocket salmon sparrow summit temple tiger valley walrus willow
    """.split()  # noqa: SIM905
)
"""Second halves of the keys; each is one token of the model's tokenizer."""

CODE_DIGITS = 6
"""Digits in one code; every digit is one token."""

HEADER = "Here are the codes:\n"
"""First line of every ledger."""

SYSTEM_PROMPT = "You look up codes."
"""A system message that the model has seen; any other, or none, will do too."""

TOKENS_PER_FACT = 4 + CODE_DIGITS + 1
"""Tokens in one ledger line: adjective, hyphen, noun, ``": "``, the digits, newline."""

_FRAME_TOKENS = 24  # header and question around the ledger, give or take a few tokens
_TOKENS_PER_ASKED = 4  # adjective, hyphen, noun, comma


@dataclass(frozen=True)
class Case:
    """One question over one ledger, with the answer that is right for it."""

    facts: tuple[tuple[str, str], ...]
    """The ledger's (key, code) pairs, in the order of the prompt."""
    asked: tuple[str, ...]
    """The keys that the question names, in the order of the answer."""
    prompt: str
    """The text for a completion endpoint; ends with a newline after the question."""
    answer: str
    """The exact text that a sound engine generates greedily before end-of-sequence."""

    def messages(self, system: str | None = None) -> list[dict[str, str]]:
        """Return the case as chat messages, with a system message in front if one is given."""
        head = [{"role": "system", "content": system}] if system is not None else []
        return [*head, {"role": "user", "content": self.prompt.rstrip("\n")}]

    def is_right(self, text: str) -> bool:
        """Tell whether a generated text is this case's answer, but for space around it."""
        return text.strip() == self.answer


def ledger_text(facts: Sequence[tuple[str, str]]) -> str:
    """Return the ledger that opens a prompt."""
    return HEADER + "".join(f"{key}: {code}\n" for key, code in facts)


def question_text(asked: Sequence[str]) -> str:
    """Return the question about one key, or about several."""
    if len(asked) == 1:
        return f"What is the code for {asked[0]}?\n"
    return f"List the codes for {', '.join(asked)}.\n"


def answer_text(facts: Sequence[tuple[str, str]], asked: Sequence[str]) -> str:
    """Return the right answer: the bare code of one key, or ``key: code`` for each of several."""
    codes = dict(facts)
    if len(asked) == 1:
        return codes[asked[0]]
    return ", ".join(f"{key}: {codes[key]}" for key in asked)


def make_facts(rng: random.Random, n_facts: int) -> tuple[tuple[str, str], ...]:
    """Return ``n_facts`` (key, code) pairs with keys that differ from each other."""
    limit = len(ADJECTIVES) * len(NOUNS)
    if not 1 <= n_facts <= limit:
        raise ValueError(f"n_facts must be between 1 and {limit}, not {n_facts}")
    keys = (divmod(index, len(NOUNS)) for index in rng.sample(range(limit), n_facts))
    return tuple(
        (f"{ADJECTIVES[a]}-{NOUNS[n]}", "".join(rng.choices("0123456789", k=CODE_DIGITS)))
        for a, n in keys
    )


def make_case(
    rng: random.Random, n_facts: int, n_asked: int = 1, depth: float | None = None
) -> Case:
    """Make a case of ``n_facts`` ledger lines that asks for ``n_asked`` of them.

    ``depth`` places the first asked key: 0.0 is the first line of the ledger and 1.0 the
    last.  The other asked keys, and the first one where ``depth`` is None, are drawn at random.
    """
    if not 1 <= n_asked <= n_facts:
        raise ValueError(f"n_asked must be between 1 and n_facts ({n_facts}), not {n_asked}")
    facts = make_facts(rng, n_facts)
    lines = rng.sample(range(n_facts), n_asked)
    if depth is not None:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth must be between 0.0 and 1.0, not {depth}")
        first = round(depth * (n_facts - 1))
        lines = [first, *[line for line in lines if line != first][: n_asked - 1]]
    asked = tuple(facts[line][0] for line in lines)
    return Case(
        facts=facts,
        asked=asked,
        prompt=ledger_text(facts) + question_text(asked),
        answer=answer_text(facts, asked),
    )


def facts_for_tokens(n_tokens: int, n_asked: int = 1) -> int:
    """Return how many ledger lines make a completion prompt of about ``n_tokens`` tokens."""
    room = n_tokens - _FRAME_TOKENS - _TOKENS_PER_ASKED * (n_asked - 1)
    return max(n_asked, round(room / TOKENS_PER_FACT))


def make_case_of_length(
    rng: random.Random, n_tokens: int, n_asked: int = 1, depth: float | None = None
) -> Case:
    """Make a case with a completion prompt of about ``n_tokens`` tokens."""
    return make_case(rng, facts_for_tokens(n_tokens, n_asked), n_asked, depth)


def make_cases(
    seed: int, count: int, min_tokens: int = 50, max_tokens: int = 1200, n_asked: int = 1
) -> Iterator[Case]:
    """Yield ``count`` cases with prompt lengths spread evenly between the two bounds."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_case_of_length(rng, rng.randint(min_tokens, max_tokens), n_asked)
