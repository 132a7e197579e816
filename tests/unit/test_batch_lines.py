"""Lines of a batch: what is refused of each, alone, and what results look like."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import Unavailable
from router.batch import lines

ENDPOINT = "/v1/completions"


def line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": "hi", **fields.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **fields}


def checked(*raw: Any) -> list[tuple[int, dict[str, Any]]]:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in raw]
    return [(number, json.loads(result)) for number, result in lines.check(texts, ENDPOINT).errors]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ("null", "object"),
        ('{"a": 1}', "custom_id"),
        (line(custom_id=""), "custom_id"),
        (line(custom_id="x" * 257), "custom_id"),
        (line(custom_id=3), "custom_id"),
        (line(method="GET"), "POST"),
        (line(url="/v1/embeddings"), "endpoint"),
        (line(url="/v1/chat/completions"), "endpoint"),
        (line(body={"stream": True}), "stream"),
        ({**line(), "body": "no object"}, "body"),
        (line(extra=1), "extra"),
        ('{"custom_id": "\\xff"}', "not JSON"),
    ],
)
def test_a_bad_line_has_its_own_error(bad: Any, words: str) -> None:
    ((number, result),) = checked(line("first"), bad, line("last"))
    assert number == 1
    assert result["response"]["status_code"] == 400
    assert words in result["error"]["message"]
    assert result["error"]["line"] == 2


def test_the_first_of_two_equal_ids_is_served() -> None:
    errors = checked(line("a"), line("b"), line("a"), line("a"))
    assert [number for number, _ in errors] == [2, 3]
    assert all("line 1" in result["error"]["message"] for _, result in errors)
    assert all(result["custom_id"] == "a" for _, result in errors)


def test_lines_are_split_and_blank_ones_left_out() -> None:
    assert lines.split(b"a\r\n\n  \nb\n") == ["a", "b"]
    assert lines.split(b"") == []
    assert lines.split("ü\u2028x".encode()) == ["ü\u2028x"]  # a line ends with a newline only


def test_what_is_no_utf8_is_a_line_of_its_own() -> None:
    raw = json.dumps(line()).encode()
    first, second, third = lines.split(raw + b"\n" + raw.replace(b"hi", b"\xff") + b"\n" + raw)
    assert [number for number, _ in checked(first, second)] == [1]
    assert third == first


def test_results_are_openais() -> None:
    done = json.loads(lines.success("a", "r-1", {"x": 1}))
    assert done["response"] == {"status_code": 200, "request_id": "r-1", "body": {"x": 1}}
    assert (done["custom_id"], done["error"]) == ("a", None)
    failed = json.loads(lines.failure(4, "b", Unavailable("not now")))
    assert failed["response"]["status_code"] == 503
    assert (failed["error"]["message"], failed["error"]["line"]) == ("not now", 5)


def test_a_hundred_thousand_lines() -> None:
    texts = [json.dumps(line(f"id-{i}")) for i in range(100_000)]
    texts[77_777] = texts[5]
    ((number, _),) = lines.check(texts, ENDPOINT).errors
    assert number == 77_777
