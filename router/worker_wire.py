"""Between the Worker service's messages and the router's own values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from cluster.errors import PdserveError, Unavailable, error_from_code
from pdserve.v1 import common_pb2, worker_pb2
from router.events import Output, WorkerFailed
from router.generation import Guide, Sampling
from router.output import FinishReason, Handoff, Logprob, Stage, TokenLogprobs, WorkerReport

_STAGES = {
    Stage.PREFILL: worker_pb2.STAGE_PREFILL,
    Stage.DECODE: worker_pb2.STAGE_DECODE,
    Stage.WHOLE: worker_pb2.STAGE_WHOLE,
}
_FINISH = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_PLAIN_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "include_stop_str_in_output",
    "ignore_eos",
    "logprobs",
    "skip_special_tokens",
)


@dataclass(frozen=True)
class SequenceStart:
    """What a worker needs to begin."""

    sequence_id: str
    stage: Stage
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    ticket: bytes
    cache_salt: str


def hello_message(router_id: str, worker_id: str, incarnation: str) -> worker_pb2.RouterMessage:
    hello = worker_pb2.Hello(router_id=router_id, worker_id=worker_id, incarnation=incarnation)
    return worker_pb2.RouterMessage(hello=hello)


def start_message(start: SequenceStart) -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(
        start=worker_pb2.StartSequence(
            sequence_id=start.sequence_id,
            stage=_STAGES[start.stage],
            prompt_token_ids=start.prompt_token_ids,
            sampling=_sampling(start.sampling),
            ticket=start.ticket,
            cache_salt=start.cache_salt,
        )
    )


def cancel_message(sequence_id: str) -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(cancel=worker_pb2.CancelSequence(sequence_id=sequence_id))


def plain_tokens(
    message: worker_pb2.PlainTokens,
) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    """Sequence, offset, token ids and text of each entry.

    Raises:
        ValueError: the columns do not fit together.
    """
    # A slice is a list, which is read five times as fast.
    token_ids = message.token_ids[:]
    counts = message.counts[:]
    if sum(counts) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens where {sum(counts)} were announced")
    columns = message.sequence_ids[:], message.offsets[:], counts, message.texts[:]
    at = 0
    for sequence_id, offset, count, text in zip(*columns, strict=True):
        yield sequence_id, offset, tuple(token_ids[at : at + count]), text
        at += count


def output_event(
    message: worker_pb2.SequenceOutput, stage: Stage, worker_id: str
) -> Output | WorkerFailed:
    """What a worker says of a sequence that it does `stage` of."""
    finish = message.finish_reason
    if finish == common_pb2.FINISH_REASON_ERROR or message.HasField("error"):
        return WorkerFailed(message.sequence_id, stage, _error(message.error))
    logprobs = _logprobs(message.logprobs) if message.logprobs else ()
    if not finish:
        return Output(
            message.sequence_id,
            stage,
            message.offset,
            tuple(message.token_ids),
            message.text,
            logprobs,
        )
    if finish == common_pb2.FINISH_REASON_CANCELLED:
        lost = Unavailable(f"worker {worker_id} cancelled the sequence")
        return WorkerFailed(message.sequence_id, stage, lost)
    stop = message.WhichOneof("stop")
    return Output(
        message.sequence_id,
        stage,
        message.offset,
        tuple(message.token_ids),
        message.text,
        logprobs,
        _FINISH.get(finish),
        getattr(message, stop) if stop else None,
        _report(message.report) if message.HasField("report") else None,
    )


def _error(error: worker_pb2.SequenceError) -> PdserveError:
    return error_from_code(error.code, error.message, error.retryable)


def _logprobs(entries: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(_logprob(entry.sampled), tuple(map(_logprob, entry.top))) for entry in entries
    )


def _logprob(entry: common_pb2.Logprob) -> Logprob:
    return Logprob(entry.token_id, entry.logprob, entry.rank, entry.text)


def _report(report: worker_pb2.SequenceReport) -> WorkerReport:
    return WorkerReport(
        _stamp(report.accepted_ago_seconds),
        _stamp(report.landed_ago_seconds),
        _stamp(report.scheduled_ago_seconds),
        _stamp(report.first_token_ago_seconds),
        _stamp(report.second_token_ago_seconds),
        report.cached_prompt_tokens,
        _handoff(report.handoff) if report.HasField("handoff") else None,
    )


def _stamp(ago: float) -> float | None:
    return ago if ago >= 0 else None


def _handoff(report: common_pb2.HandoffReport) -> Handoff:
    return Handoff(
        report.transport,
        report.bytes,
        report.messages,
        report.held_tokens,
        report.blocks,
        report.transfer_seconds,
        report.elapsed_seconds,
    )


@lru_cache(maxsize=64)
def _sampling(sampling: Sampling) -> common_pb2.SamplingParams:
    """Unset stays unset: the engine's defaults are vLLM's. Both workers of a request are sent the
    same, and most requests of an application: nobody changes what this returns."""
    plain = {name: getattr(sampling, name) for name in _PLAIN_SAMPLING}
    message = common_pb2.SamplingParams(
        n=sampling.n,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logit_bias=dict(sampling.logit_bias),
        **{name: value for name, value in plain.items() if value is not None},
    )
    if sampling.guide is not None:
        message.guide.CopyFrom(_guide(sampling.guide))
    return message


def _guide(guide: Guide) -> common_pb2.Guide:
    match guide.kind:
        case "json_schema":
            return common_pb2.Guide(json_schema=guide.text)
        case "regex":
            return common_pb2.Guide(regex=guide.text)
        case "grammar":
            return common_pb2.Guide(grammar=guide.text)
        case "choice":
            return common_pb2.Guide(choice=common_pb2.ChoiceGuide(choices=guide.choices))
        case "json_object":
            return common_pb2.Guide(json_object=True)
