"""Each value out of its limits is refused by a message that names the field and the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded, InvalidRequest, NotFound
from pdserve.v1 import inference_pb2
from router import client_wire, validate
from router.generation import ChatMessage, Guide, Sampling
from router.validate import ModelLimits

LIMITS = ModelLimits("tiny", max_model_len=64, vocab_size=100)

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("max_tokens", {"max_tokens": 0}, "at least 1"),
    ("n", {"n": 0}, "1 to 16"),
    ("n", {"n": 17}, "1 to 16"),
    ("temperature", {"temperature": -0.1}, "0 to 2"),
    ("temperature", {"temperature": 2.1}, "0 to 2"),
    ("temperature", {"temperature": math.nan}, "0 to 2"),
    ("temperature", {"temperature": math.inf}, "0 to 2"),
    ("top_p", {"top_p": 0.0}, "above 0 and at most 1"),
    ("top_p", {"top_p": 1.5}, "above 0 and at most 1"),
    ("top_k", {"top_k": -2}, "from 0 to 100"),
    ("top_k", {"top_k": 1 << 32}, "from 0 to 100"),
    ("min_p", {"min_p": -1.0}, "0 to 1"),
    ("min_p", {"min_p": 1e300}, "0 to 1"),
    ("presence_penalty", {"presence_penalty": 2.5}, "-2 to 2"),
    ("frequency_penalty", {"frequency_penalty": -math.inf}, "-2 to 2"),
    ("repetition_penalty", {"repetition_penalty": 0.0}, "above 0 and at most 10"),
    ("repetition_penalty", {"repetition_penalty": math.nan}, "above 0 and at most 10"),
    ("seed", {"seed": 1 << 63}, "from -9223372036854775808"),
    ("logprobs", {"logprobs": 21}, "0 to 20"),
    ("stop", {"stop": ("x",) * 17}, "at most 16"),
    ("stop[0]", {"stop": ("x" * 257,)}, "at most 256"),
    ("stop[1]", {"stop": ("x", "")}, "not be empty"),
    ("stop_token_ids", {"stop_token_ids": (1,) * 65}, "at most 64"),
    ("stop_token_ids", {"stop_token_ids": (100,)}, "vocabulary of 100"),
    ("logit_bias", {"logit_bias": tuple((i, 0.0) for i in range(301))}, "at most 300"),
    ("logit_bias", {"logit_bias": ((100, 1.0),)}, "vocabulary of 100"),
    ("logit_bias[5]", {"logit_bias": ((5, 101.0),)}, "-100 to 100"),
    ("logit_bias[5]", {"logit_bias": ((5, math.nan),)}, "-100 to 100"),
    ("guide.json_schema", {"guide": Guide("json_schema", "{")}, "not JSON"),
    ("guide.json_schema", {"guide": Guide("json_schema", "[]")}, "JSON object"),
    ("guide.regex", {"guide": Guide("regex", "")}, "not be empty"),
    ("guide.regex", {"guide": Guide("regex", "x" * 65537)}, "at most 65536"),
    ("guide.choice", {"guide": Guide("choice")}, "strings that are not empty"),
]


@pytest.mark.parametrize("field, values, limit", BAD)
def test_a_bad_value_is_named(field: str, values: dict[str, Any], limit: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate.check_sampling(Sampling(**values), LIMITS)
    assert refused.value.field == f"sampling.{field}"
    assert limit in str(refused.value)


def test_the_limits_themselves_pass() -> None:
    validate.check_sampling(
        Sampling(
            max_tokens=1,
            n=16,
            temperature=2.0,
            top_p=1.0,
            min_p=0.0,
            presence_penalty=-2.0,
            repetition_penalty=10.0,
            seed=-(1 << 63),
            logprobs=20,
            stop=("x" * 256,) * 16,
            logit_bias=((99, -100.0),),
            guide=Guide("json_schema", '{"type": "object"}'),
        ),
        LIMITS,
    )


def test_prompts() -> None:
    validate.check_prompt([0] * 63, LIMITS, "text")
    for token_ids, words in [
        ([], "at least one token"),
        ([0] * 64, "at most 63"),
        ([1, 100], "token id 100 is outside the vocabulary of 100"),
        ([-1], "token id -1"),
    ]:
        with pytest.raises(InvalidRequest, match=words) as refused:
            validate.check_prompt(token_ids, LIMITS, "text")
        assert refused.value.field == "text"


def test_max_tokens_is_what_is_left() -> None:
    assert validate.resolve_max_tokens(Sampling(), 60, LIMITS).max_tokens == 4
    assert validate.resolve_max_tokens(Sampling(), 60, LIMITS, default=16).max_tokens == 4
    assert validate.resolve_max_tokens(Sampling(), 10, LIMITS, default=16).max_tokens == 16
    assert validate.resolve_max_tokens(Sampling(max_tokens=4), 60, LIMITS).max_tokens == 4
    with pytest.raises(InvalidRequest, match="context of 64"):
        validate.resolve_max_tokens(Sampling(max_tokens=5), 60, LIMITS)
    with pytest.raises(InvalidRequest, match=r"min_tokens.*at most max_tokens, which is 4"):
        validate.resolve_max_tokens(Sampling(min_tokens=5), 60, LIMITS)


def test_models() -> None:
    assert validate.check_model("", ["a"]) == "a"
    assert validate.check_model("b", ["a", "b"]) == "b"
    with pytest.raises(NotFound, match=r"no 'c'.*serves a, b"):
        validate.check_model("c", ["a", "b"])
    with pytest.raises(InvalidRequest, match="model: is required"):
        validate.check_model("", ["a", "b"])


def test_deadlines() -> None:
    assert validate.check_timeout(2.0) == 2.0
    for seconds in (None, math.nan, math.inf):
        with pytest.raises(InvalidRequest) as refused:
            validate.check_timeout(seconds)
        assert refused.value.field == "deadline"
    for seconds in (0.0, -1.0):
        with pytest.raises(DeadlineExceeded):
            validate.check_timeout(seconds)


@pytest.mark.parametrize("request_id", ["", "a b", "ü", "x" * 129, "a/b", "a\n"])
def test_bad_request_ids(request_id: str) -> None:
    with pytest.raises(InvalidRequest, match="128 characters"):
        validate.check_request_id(request_id)


def test_salt_and_chat() -> None:
    validate.check_cache_salt("x" * 256)
    with pytest.raises(InvalidRequest, match="at most 256"):
        validate.check_cache_salt("x" * 257)
    with pytest.raises(InvalidRequest, match="at least one message"):
        validate.check_chat([])
    with pytest.raises(InvalidRequest, match=r"chat.messages\[1\].role"):
        validate.check_chat([ChatMessage("user", "x"), ChatMessage("", "y")])


def test_each_of_n_has_its_own_seed() -> None:
    sampling = Sampling(n=3, seed=40)
    assert [sampling.completion(i).seed for i in range(3)] == [40, 41, 42]
    assert Sampling(n=3).completion(2).seed is None
    assert sampling.completion(1).n == 1


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1 << 32},
        {"min_tokens": 1 << 32},
        {"stop_token_ids": (1 << 32,)},
        {"logit_bias": ((1 << 32, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"seed": -(1 << 63) - 1},
        {"seed": (1 << 63) - 1, "n": 16},
    ],
)
def test_no_integer_is_beyond_what_the_protocol_carries(values: dict[str, Any]) -> None:
    sampling = Sampling(**values)
    with pytest.raises(InvalidRequest):
        validate.check_sampling(sampling, LIMITS)
        validate.resolve_max_tokens(sampling, 1, LIMITS)


def test_replayable_is_greedy_or_seeded_as_vllm_has_it() -> None:
    assert Sampling(temperature=0).replayable
    assert not Sampling(temperature=1e-6).replayable  # vLLM raises it to 0.01
    assert not Sampling().replayable
    assert Sampling(seed=0).replayable
    assert Sampling(seed=-2).replayable
    assert not Sampling(seed=-1).replayable
    assert not Sampling(seed=-2, n=2).completion(1).replayable


def test_chats_are_bounded() -> None:
    message = ChatMessage("user", "")
    with pytest.raises(InvalidRequest, match="at most 4096 messages"):
        validate.check_chat([message] * 4097)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].role: must have at most 64"):
        validate.check_chat([ChatMessage("x" * 65, "")])


def test_too_many_messages_are_refused_before_they_are_walked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walked: list[object] = []
    monkeypatch.setattr(client_wire, "refuse_unknown_fields", walked.append)
    request = inference_pb2.GenerateRequest()
    for _ in range(validate.MAX_MESSAGES + 1):
        request.chat.messages.add()
    with pytest.raises(InvalidRequest, match="at most 4096 messages"):
        client_wire.ask(request, 0.0, 1.0)
    assert walked == []
