"""The prefix index against a dictionary: whatever comes and goes, it says the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.prefix import block_hashes, chain, few_hashes, named
from router.prefix_index import PrefixIndex

HOLDERS, CHAINS, DEPTH = 70, 6, 12
PROMPTS = [block_hashes([c] * 4 * DEPTH, 4, "salt") for c in range(CHAINS)]

operation = st.tuples(
    st.sampled_from(["add", "remove", "forget"]),
    st.integers(0, HOLDERS - 1),
    st.integers(0, CHAINS - 1),
    st.integers(0, DEPTH),
    st.integers(0, DEPTH),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(operation, max_size=60))
def test_it_says_what_a_dictionary_says(operations: list[tuple[str, int, int, int, int]]) -> None:
    index = PrefixIndex(2000)
    truth: dict[int, set[int]] = {}
    for what, holder, prompt, low, high in operations:
        names = PROMPTS[prompt][min(low, high) : max(low, high)]
        if what == "add":
            index.add(holder, names)
            for name in names.tolist():
                truth.setdefault(name, set()).add(holder)
        elif what == "remove":
            index.remove(holder, names)
            for name in names.tolist():
                truth.get(name, set()).discard(holder)
        else:
            index.forget(holder)
            for holders in truth.values():
                holders.discard(holder)
        for chain_names in PROMPTS:
            expected: dict[int, int] = {}
            for holder_id in range(HOLDERS):
                depth = 0
                for name in chain_names.tolist():
                    if holder_id not in truth.get(name, ()):
                        break
                    depth += 1
                if depth:
                    expected[holder_id] = depth
            assert index.held(chain_names) == expected
            assert index.held(chain_names.tolist()) == expected
    assert len(index) == sum(1 for holders in truth.values() if holders)
    assert index.dropped == 0


def test_memory_is_bounded_and_what_does_not_fit_is_forgotten() -> None:
    index = PrefixIndex(1000)
    size = index.bytes
    rng = np.random.default_rng(1)
    names = rng.integers(1, 1 << 63, 100_000, dtype=np.uint64)
    for part in np.split(names, 100):
        index.add(3, part)
    assert index.bytes == size and len(index) + index.dropped == 100_000
    index.forget(3)
    assert len(index) == 0
    index.add(4, names[:900])
    assert len(index) > 850  # the cells of who has gone are taken


def test_it_fills_to_what_it_was_made_for() -> None:
    index = PrefixIndex(100_000)
    rng = np.random.default_rng(2)
    index.add(0, rng.integers(1, 1 << 63, 100_000, dtype=np.uint64))
    assert index.dropped < 100
    assert index.bytes / 100_000 <= 35


def test_names_depend_on_everything_before_them_and_on_the_salt() -> None:
    tokens = list(range(64))
    names = block_hashes(tokens, 8, "a")
    assert len(names) == 8 and len(set(names.tolist())) == 8
    assert (block_hashes(tokens[:-1], 8, "a") == names[:7]).all()
    changed = block_hashes([9, *tokens[1:]], 8, "a")
    assert not (changed == names).any()
    swapped = block_hashes([*tokens[8:16], *tokens[:8], *tokens[16:]], 8, "a")
    assert not (swapped == names).any()
    assert not (block_hashes(tokens, 8, "b") == names).any()


def test_a_chain_goes_on_from_its_parent() -> None:
    tokens = list(range(100, 164))
    whole = chain(tokens, 8)
    rest = chain(tokens[24:], 8, parent=int(whole[2]), position=3)
    assert (rest == whole[3:]).all()
    assert (named(rest, "s") == block_hashes(tokens, 8, "s")[3:]).all()


@given(
    st.lists(st.integers(0, (1 << 32) - 1), max_size=300), st.integers(1, 40), st.text(max_size=5)
)
def test_few_names_are_the_names(token_ids: list[int], block_size: int, salt: str) -> None:
    names = block_hashes(token_ids, block_size, salt).tolist()
    assert few_hashes(token_ids, block_size, salt) == names
