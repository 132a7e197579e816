"""The first token is forced once, and only for requests that were handed off here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from cluster.kv.first_token import FIRST_TOKENS, FirstTokenProcessor
from cluster.kv.handoff import HandoffParams

VOCABULARY = 8


def params(side: str) -> SamplingParams:
    handoff = HandoffParams(side, f"h-{side}", "ticket", 4, 10.0)  # type: ignore[arg-type]
    return SamplingParams(extra_args={"kv_transfer_params": handoff.to_dict()})


def batch(*added: tuple[int, SamplingParams, list[int]]) -> Any:
    rows = [(row, sampling, [1, 2], outputs) for row, sampling, outputs in added]
    return BatchUpdate(batch_size=len(rows), removed=[], added=rows, moved=[])


@pytest.fixture
def processor() -> FirstTokenProcessor:
    FIRST_TOKENS.put("h-decode", 5)
    return FirstTokenProcessor(None, torch.device("cpu"), False)  # type: ignore[arg-type]


def test_only_a_decodes_first_token_is_forced(processor: FirstTokenProcessor) -> None:
    outputs: list[int] = []
    processor.update_state(
        batch((0, SamplingParams(), []), (1, params("decode"), outputs), (2, params("prefill"), []))
    )
    drawn = torch.randn(3, VOCABULARY)
    logits = processor.apply(drawn.clone())
    assert torch.equal(logits[[0, 2]], drawn[[0, 2]])
    assert logits[1].argmax() == 5 and logits[1].exp().tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_until_it_is_there_and_then_at_no_cost(processor: FirstTokenProcessor) -> None:
    """A step may be in vain, as when a preempted request is computed again in parts."""
    outputs: list[int] = []
    processor.update_state(batch((0, params("decode"), outputs)))
    for _ in range(2):
        assert processor.apply(torch.zeros(1, VOCABULARY)).argmax() == 5
    outputs.append(-1)  # vLLM's stand-in for a token that is still on the device
    drawn = torch.randn(1, VOCABULARY)
    assert torch.equal(processor.apply(drawn.clone()), drawn)
    assert not processor.req_info
