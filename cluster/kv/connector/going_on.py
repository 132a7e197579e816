"""A handed-off request goes on in decode's engine as if that had sampled its first token itself.

The scheduler counts the token as an output of the request once its KV has landed
(`landings.py`); here the model runner, which hears only of prompts, is told of it. So decode's
first step samples the second token, and everything behind the first – penalties, min_tokens, bad
words, the seeded generator's draws – finds the state it would have had in one engine.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from cluster.kv.first_token import FIRST_TOKENS
from cluster.kv.handoff import HandoffParams

_add_request = InputBatch.add_request


def install(use_fp64_gumbel: bool) -> None:
    """From now on, in this process: vLLM has no place of its own for it.

    Args:
        use_fp64_gumbel: the model's, of vLLM's configuration: its sampler draws more then.
    """
    sampler = TopKTopPSampler(use_fp64_gumbel=use_fp64_gumbel)

    def add_request_that_goes_on(batch: InputBatch, request: CachedRequestState) -> int:
        if goes_on(request):
            request.output_token_ids.append(FIRST_TOKENS.get(_handoff(request).handoff_id))
            if request.generator is not None:
                draw(sampler, batch, request.generator)
        index: int = _add_request(batch, request)
        return index

    InputBatch.add_request = add_request_that_goes_on


def goes_on(request: CachedRequestState) -> bool:
    """It is new, and its whole prompt is computed: any other prompt has a token left to compute,
    from which its first one is sampled."""
    return not request.output_token_ids and request.num_computed_tokens == request.num_prompt_tokens


def _handoff(request: CachedRequestState) -> HandoffParams:
    assert request.sampling_params is not None
    extra: dict[str, Any] = request.sampling_params.extra_args or {}
    handoff = HandoffParams.from_dict(extra.get("kv_transfer_params"))
    assert handoff is not None and handoff.side == "decode", "a prompt that nobody handed off"
    return handoff


def draw(sampler: TopKTopPSampler, batch: InputBatch, generator: torch.Generator) -> None:
    """What the first token took of a seeded generator, by vLLM's own sampler: how much that is
    differs by device."""
    sampler(torch.zeros(1, batch.vocab_size, device=batch.device), {0: generator}, None, None)
