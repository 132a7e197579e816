"""Trace files: the three formats, and what is wrong with a bad one, by line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from cluster.simulator.traces import Trace, read_trace
from cluster.simulator.workload import mean_rate

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = (
    HEADER
    + "2023-11-16 18:17:03.9799600,4808,10\n"
    + "2023-11-16 18:17:04.0319600,3180,8\n"
    + "2023-11-16 18:17:05.9799600,110,27\n"
)
MOONCAKE = "".join(
    f'{{"timestamp": {ms}, "input_length": 700, "output_length": 5, "hash_ids": [0, {ms}]}}\n'
    for ms in (0, 0, 0, 3000, 3000)
)
OWN = (
    '{"at": 10.5, "prompt": 7, "output": 3, "blocks": [1], "block_tokens": 4, "kind": "chat"}\n'
    '{"at": 11.0, "prompt": 9, "output": 2}\n'
)


def read(tmp_path: Path, text: str, max_model_len: int = 10_000) -> Trace:
    file = tmp_path / "trace"
    file.write_text(text)
    return read_trace(file, max_model_len)


def test_azure(tmp_path: Path) -> None:
    trace = read(tmp_path, AZURE)
    assert [(round(a.at, 6), a.prompt, a.output) for a in trace.arrivals] == [
        (0, 4808, 10),
        (0.052, 3180, 8),
        (2.0, 110, 27),
    ]
    assert mean_rate(trace.arrivals) == pytest.approx(1.0)


def test_mooncake_is_jittered_within_its_stamps_and_always_alike(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE)
    assert trace == read(tmp_path, MOONCAKE)
    assert len({a.at for a in trace.arrivals}) == 5
    assert trace.arrivals[-1].at < 6.0
    assert {a.blocks for a in trace.arrivals} == {(0, 0), (0, 3000)}


def test_our_own(tmp_path: Path) -> None:
    first, second = read(tmp_path, OWN).arrivals
    assert (first.at, first.blocks, first.block_tokens, first.kind) == (0.0, (1,), 4, "chat")
    assert (second.at, second.blocks) == (0.5, ())


def test_unsorted_stamps_are_sorted_and_counted(tmp_path: Path) -> None:
    lines = OWN.splitlines(keepends=True)
    trace = read(tmp_path, lines[1] + lines[0])
    assert trace.unsorted == 1
    assert [a.prompt for a in trace.arrivals] == [7, 9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (HEADER, "is empty"),
        ("\n\n", "is empty"),
        ("".join(AZURE.splitlines(keepends=True)[:2]), "has one request"),
        ("what,ever\n1,2\n", "known are Azure's CSV"),
        (AZURE.replace("GeneratedTokens", "Tokens"), "line 1: has no column GeneratedTokens"),
        (AZURE.replace("GeneratedTokens", "GeneratedTokens,User"), "unknown column 'User'"),
        (AZURE.replace("3180", "-3180"), "line 3: ContextTokens is '-3180'"),
        (AZURE.replace("3180", "nan"), "line 3: ContextTokens is 'nan'"),
        (AZURE.replace("3180", "0"), "line 3: prompt and output lengths must be at least 1"),
        (AZURE.replace("3180", "31800"), "line 3: 31800 \\+ 8 tokens are over the model's 10000"),
        (AZURE.replace("2023-11-16 18:17:04", "noon"), "line 3: TIMESTAMP"),
        (AZURE.replace(",8\n", "\n"), "line 3: GeneratedTokens is None"),
        (MOONCAKE.replace("3000,", "-3000,"), "line 4: timestamp is -3000"),
        (MOONCAKE + "{", "line 6: is not JSON"),
        (MOONCAKE + "[]", "line 6: is not an object"),
        (MOONCAKE.replace('"hash_ids"', '"hashes"'), "line 1: has the unknown field 'hashes'"),
        (OWN.replace("11.0", "NaN"), "line 2: at is nan"),
        (OWN.replace("11.0", "1e999"), "line 2: at is inf"),
        (OWN.replace("[1]", '["x"]'), "line 1: blocks is not a list"),
        (OWN.replace('"output": 2', '"output": true'), "line 2: output is True"),
        (OWN.replace("11.0", "10.5"), "all requests come at once"),
    ],
)
def test_bad_traces_are_refused_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read(tmp_path, text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_trace(tmp_path / "none", 100)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="is not text"):
        read_trace(tmp_path / "bytes", 100)


def test_a_rate_of_nothing_is_infinite() -> None:
    assert math.isinf(mean_rate([]))
