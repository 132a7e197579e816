"""pdserve's sampling parameters as vLLM's."""

from __future__ import annotations

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from cluster.engine.protocol import Guide, Sampling
from cluster.errors import InvalidRequest
from cluster.kv.handoff import HandoffParams


def to_vllm(sampling: Sampling, handoff: HandoffParams | None) -> SamplingParams:
    """Raises InvalidRequest for what vLLM does not take."""
    try:
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            skip_special_tokens=sampling.skip_special_tokens,
            logit_bias=dict(sampling.logit_bias) or None,
            structured_outputs=_structured(sampling.guide),
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": handoff.to_dict()} if handoff else None,
        )
    except ValueError as error:
        raise InvalidRequest("sampling", str(error)) from error


def _structured(guide: Guide | None) -> StructuredOutputsParams | None:
    if guide is None:
        return None
    return StructuredOutputsParams(
        json=guide.json_schema,
        regex=guide.regex,
        grammar=guide.grammar,
        choice=list(guide.choices) or None,
        json_object=guide.json_object or None,
    )
