"""A request that was handed off goes on behind its first token: in the scheduler, in the model
runner, and in what the front end sees."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from cluster.kv.connector import going_on
from cluster.kv.connector.landings import HandoffScheduler
from cluster.kv.first_token import FIRST_TOKENS
from cluster.kv.handoff import HandoffParams

VOCABULARY = 50


@pytest.fixture
def landed() -> Iterator[None]:
    FIRST_TOKENS.put("h", 5)
    yield
    FIRST_TOKENS.forget("h")


def state(computed: int, *outputs: int, generator: torch.Generator | None = None) -> Any:
    handoff = HandoffParams("decode", "h", "ticket", 4, 10.0)
    return CachedRequestState(
        req_id="r",
        prompt_token_ids=[1, 2, 3, 4],
        mm_features=[],
        sampling_params=SamplingParams(extra_args={"kv_transfer_params": handoff.to_dict()}),
        generator=generator,
        block_ids=([0],),
        num_computed_tokens=computed,
        output_token_ids=list(outputs),
    )


def add(
    request: CachedRequestState, monkeypatch: pytest.MonkeyPatch, fp64: bool = False
) -> list[int]:
    """Its outputs as the model runner gets to know them."""
    seen: list[list[int]] = []
    monkeypatch.setattr(
        going_on, "_add_request", lambda batch, told: seen.append(list(told.output_token_ids)) or 0
    )
    monkeypatch.setattr(InputBatch, "add_request", InputBatch.add_request)  # is put back
    going_on.install(fp64)
    batch: Any = SimpleNamespace(vocab_size=VOCABULARY, device=torch.device("cpu"))
    assert InputBatch.add_request(batch, request) == 0
    return seen[0]


@pytest.mark.usefixtures("landed")
@pytest.mark.parametrize(
    ("computed", "outputs", "told"),
    [
        (4, [], [5]),  # it has landed
        (3, [], []),  # a prompt like any other
        (4, [5], [5]),  # it was out of the batch for a while
        (5, [5, 6], [5, 6]),
        (0, [5, 6], [5, 6]),  # preempted
    ],
)
def test_the_model_runner_hears_of_the_first_token_once(
    computed: int, outputs: list[int], told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert add(state(computed, *outputs), monkeypatch) == told


def test_nothing_goes_on_that_has_not_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        add(state(4), monkeypatch)


@pytest.mark.usefixtures("landed")
@pytest.mark.parametrize("fp64", [False, True])
def test_a_seeded_generator_has_drawn_for_it(fp64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(generator: torch.Generator) -> list[int]:
        logits = torch.linspace(0, 1, VOCABULARY)[None]
        sampler = TopKTopPSampler(use_fp64_gumbel=fp64)
        return [int(sampler(logits.clone(), {0: generator}, None, None)[0]) for _ in range(20)]

    current_platform.import_kernels()
    here = torch.Generator().manual_seed(7)
    add(state(4, generator=here), monkeypatch, fp64)
    assert sampled(here)[:19] == sampled(torch.Generator().manual_seed(7))[1:]


class _Manager:
    def __init__(self, accepts: bool) -> None:
        self._accepts = accepts
        self.seen: list[tuple[str, list[int]]] = []

    def accept_tokens(self, request: Any, tokens: list[int]) -> bool:
        self.seen.append((request.request_id, tokens))
        return self._accepts


def scheduler(accepts: bool = True) -> Any:
    made: Any = HandoffScheduler.__new__(HandoffScheduler)
    made._untold = {}
    made.failed_recving_kv_req_ids = {"broken"}
    made.grammar_compile_error_reqs = set()
    made.structured_output_manager = _Manager(accepts)
    made.connector = SimpleNamespace(first_token=lambda name: 5)
    made.requests = {}
    made.max_model_len = 100
    return made


def land(made: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Its outputs by the time vLLM decides where it goes on."""
    outputs: list[int] = []
    request = SimpleNamespace(
        request_id=name, append_output_token_ids=outputs.append, max_tokens=9, num_tokens=5
    )
    seen: list[list[int]] = []
    monkeypatch.setattr(
        Scheduler, "_update_waiting_for_remote_kv", lambda self, told: seen.append(list(outputs))
    )
    made.requests[name] = request
    made._update_waiting_for_remote_kv(request)
    return seen[0]


def test_what_has_landed_has_an_output_and_what_failed_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler()
    assert land(made, "whole", monkeypatch) == [5]
    assert land(made, "broken", monkeypatch) == []
    assert made.structured_output_manager.seen == [("whole", [5])]
    assert not made.grammar_compile_error_reqs


def test_a_first_token_outside_of_the_grammar_ends_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler(accepts=False)
    land(made, "whole", monkeypatch)
    assert made.grammar_compile_error_reqs == {"whole"}


def after_step(
    made: Any, monkeypatch: pytest.MonkeyPatch, *outputs: EngineCoreOutput, ended: str = ""
) -> list[list[int]]:
    def update(self: Any, *args: object) -> dict[int, Any]:
        self.requests.pop(ended, None)
        return {0: SimpleNamespace(outputs=list(outputs))}

    monkeypatch.setattr(Scheduler, "update_from_output", update)
    made.update_from_output(None, None)
    return [output.new_token_ids for output in outputs]


def test_the_first_output_holds_both_tokens_and_later_ones_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler()
    land(made, "a", monkeypatch)
    land(made, "b", monkeypatch)

    def output(name: str, *tokens: int) -> EngineCoreOutput:
        return EngineCoreOutput(request_id=name, new_token_ids=list(tokens))

    first = after_step(made, monkeypatch, output("own", 9), output("a", 6), ended="a")
    assert first == [[9], [5, 6]]  # also if it ends with it
    assert after_step(made, monkeypatch, output("b")) == [[]]  # not sampled yet
    assert after_step(made, monkeypatch, output("b", 7)) == [[5, 7]]
    assert after_step(made, monkeypatch, output("b", 8)) == [[8]]


def test_a_request_that_ended_before_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler()
    land(made, "a", monkeypatch)
    after_step(made, monkeypatch, ended="a")
    assert not made._untold


def test_there_is_a_row_of_logprobs_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler()
    land(made, "a", monkeypatch)
    rows = LogprobsLists(np.array([[6, 8]]), np.array([[-1.0, -2.0]]), np.array([1]))
    output = EngineCoreOutput(request_id="a", new_token_ids=[6], new_logprobs=rows)
    assert after_step(made, monkeypatch, output) == [[5, 6]]
    assert output.new_logprobs is not None
    assert output.new_logprobs.logprob_token_ids.tolist() == [[5, 8], [6, 8]]
    assert output.new_logprobs.logprobs[1].tolist() == [-1.0, -2.0]
    assert output.new_logprobs.sampled_token_ranks.tolist() == [0, 1]


def test_decode_does_not_make_up_the_first_tokens_logprobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler()
    land(made, "a", monkeypatch)
    rows = LogprobsLists(np.array([[6, 8]]), np.array([[-1.0, -2.0]]), np.array([1]))
    output = EngineCoreOutput(request_id="a", new_token_ids=[6], new_logprobs=rows)
    after_step(made, monkeypatch, output)
    assert output.new_logprobs is not None
    assert np.isnan(output.new_logprobs.logprobs[0]).all()
