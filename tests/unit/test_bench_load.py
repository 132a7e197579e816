"""What `pdserve bench` asks for: arrivals, lengths, tokens."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import fmean, pvariance

import pytest

from cluster.cli.bench_load import (
    Lengths,
    Prompts,
    Shape,
    arriving,
    default_lengths,
    drawn,
    parse_lengths,
    parse_rates,
    sped,
)
from cluster.errors import InvalidRequest
from cluster.simulator.workload import Arrival

SHAPE = Shape(Lengths(100, 200), Lengths(8, 8))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_that_were_asked_for(burstiness: float) -> None:
    arrivals = islice(arriving(SHAPE, 5.0, burstiness, seed=3), 20_000)
    gaps = [after.at - before.at for before, after in pairwise(arrivals)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pvariance(gaps) / fmean(gaps) ** 2 == pytest.approx(burstiness, rel=0.1)


def test_no_burstiness_is_equal_distances() -> None:
    arrivals = islice(arriving(SHAPE, 4.0, 0.0, seed=3), 5)
    assert [each.at for each in arrivals] == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_a_seed_is_the_same_load_and_another_one_another() -> None:
    first, again, other = (list(islice(arriving(SHAPE, 5.0, 1.0, s), 50)) for s in (1, 1, 2))
    assert first == again != other
    assert {each.output for each in first} == {8}
    assert all(100 <= each.prompt <= 200 for each in first)
    assert {each.at for each in islice(drawn(SHAPE, 1), 50)} == {0.0}


def test_lengths_and_rates_are_read_or_refused() -> None:
    assert parse_lengths("prompt-tokens", "512") == Lengths(512, 512)
    assert parse_lengths("prompt-tokens", " 16-32 ") == Lengths(16, 32)
    for wrong in ("", "0", "32-16", "-5", "1e3", "16-", "a lot"):
        with pytest.raises(InvalidRequest, match="prompt-tokens"):
            parse_lengths("prompt-tokens", wrong)
    assert parse_rates("8,2,4,2") == (2.0, 4.0, 8.0)
    for wrong in ("", "0", "-1", "inf", "nan", "2,,4"):
        with pytest.raises(InvalidRequest, match="rate"):
            parse_rates(wrong)


@pytest.mark.parametrize("max_len", [2, 16, 300, 576, 100_000])
def test_what_is_not_given_fits_the_model(max_len: int) -> None:
    prompt, output = default_lengths(None, None, max_len)
    Shape(prompt, output).check(max_len)
    given, output = default_lengths(Lengths(1, max_len - 1), None, max_len)
    assert given == Lengths(1, max_len - 1)
    Shape(given, output).check(max_len)
    assert default_lengths(None, None, 0) == (Lengths(512, 512), Lengths(64, 64))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt-tokens: 200 \+ 8 tokens .* 207"):
        SHAPE.check(207)
    with pytest.raises(InvalidRequest, match="shared-prefix: 100 tokens leave nothing of 100"):
        Shape(Lengths(100, 200), Lengths(8, 8), shared=100).check(0)


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    prompts = Prompts(vocab=800, seed=1, shared=40)
    made = [prompts.ids(Arrival(0.0, 100 + i, 1), i) for i in range(20)]
    assert [len(ids) for ids in made] == [100 + i for i in range(20)]
    assert all(1 <= token < 800 for ids in made for token in ids)
    assert len({tuple(ids[:40]) for ids in made}) == 1
    assert len({tuple(ids[40:60]) for ids in made}) == 20
    assert made[3] == Prompts(800, 1, 40).ids(Arrival(0.0, 103, 1), 3)
    assert made[3] != Prompts(800, 2, 40).ids(Arrival(0.0, 103, 1), 3)


def test_a_traces_blocks_are_alike_where_their_hashes_are() -> None:
    prompts = Prompts(vocab=1000, seed=1)
    one = prompts.ids(Arrival(0.0, 150, 1, (7, -8, 9), 50), 0)
    other = prompts.ids(Arrival(1.0, 120, 1, (7, -8, 10), 50), 1)
    assert (len(one), len(other)) == (150, 120)
    assert one[:100] == other[:100] and one[100:120] != other[100:]
    beyond = prompts.ids(Arrival(0.0, 130, 1, (7, -8), 50), 2)  # whole blocks only are named
    assert beyond[:100] == one[:100] and len(beyond) == 130


def test_a_trace_is_sped_up() -> None:
    trace = [Arrival(0.0, 5, 1), Arrival(6.0, 5, 1)]
    assert [each.at for each in sped(trace, 3.0)] == [0.0, 2.0]
