"""Sequences as Worker messages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.engine.protocol import Guide, Logprob, Sampling, TokenLogprobs
from cluster.errors import HandoffRefused, InvalidRequest, PdserveError, status_of
from cluster.kv.handoff import HandoffResult
from cluster.worker.blocks import BlockChanges
from cluster.worker.sequence import SequenceReport, SequenceStart, SequenceStep, Stage
from pdserve.v1 import common_pb2, worker_pb2

_STAGES: dict[int, Stage] = {
    worker_pb2.STAGE_PREFILL: "prefill",
    worker_pb2.STAGE_DECODE: "decode",
    worker_pb2.STAGE_WHOLE: "whole",
}
_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "cancelled": common_pb2.FINISH_REASON_CANCELLED,
    "error": common_pb2.FINISH_REASON_ERROR,
}
_REST = 1 + SequenceStep._fields.index("text")
_PLAIN = SequenceStep("", 0, [])[_REST:]
"""What a step that only brings tokens and text has in its other fields."""


def sequence_start(message: worker_pb2.StartSequence) -> SequenceStart:
    """Raises InvalidRequest for a stage this worker does not know."""
    stage = _STAGES.get(message.stage)
    if stage is None:
        raise InvalidRequest("stage", "is not known to this worker: update it")
    return SequenceStart(
        message.sequence_id,
        stage,
        list(message.prompt_token_ids),
        _sampling(message.sampling),
        message.ticket,
        message.cache_salt,
    )


def _sampling(p: common_pb2.SamplingParams) -> Sampling:
    """The router has checked every value and filled in max_tokens."""
    return Sampling(
        max_tokens=p.max_tokens,
        min_tokens=p.min_tokens,
        temperature=p.temperature if p.HasField("temperature") else 1.0,
        top_p=p.top_p if p.HasField("top_p") else 1.0,
        top_k=p.top_k if p.HasField("top_k") else 0,
        min_p=p.min_p if p.HasField("min_p") else 0.0,
        seed=p.seed if p.HasField("seed") else None,
        presence_penalty=p.presence_penalty if p.HasField("presence_penalty") else 0.0,
        frequency_penalty=p.frequency_penalty if p.HasField("frequency_penalty") else 0.0,
        repetition_penalty=p.repetition_penalty if p.HasField("repetition_penalty") else 1.0,
        stop=tuple(p.stop),
        stop_token_ids=tuple(p.stop_token_ids),
        include_stop_str_in_output=p.include_stop_str_in_output,
        ignore_eos=p.ignore_eos,
        logprobs=p.logprobs if p.HasField("logprobs") else None,
        skip_special_tokens=p.skip_special_tokens if p.HasField("skip_special_tokens") else True,
        logit_bias=dict(p.logit_bias),
        guide=_guide(p.guide) if p.HasField("guide") else None,
    )


def _guide(guide: common_pb2.Guide) -> Guide | None:
    match guide.WhichOneof("kind"):
        case "json_schema":
            return Guide(json_schema=guide.json_schema)
        case "regex":
            return Guide(regex=guide.regex)
        case "grammar":
            return Guide(grammar=guide.grammar)
        case "choice":
            return Guide(choices=tuple(guide.choice.choices))
        case "json_object":
            return Guide(json_object=True)
    return None


def worker_message(
    steps: Iterable[SequenceStep], blocks: BlockChanges | None, now: float
) -> worker_pb2.WorkerMessage:
    """`now` is CLOCK_MONOTONIC at sending: stamps cross as seconds ago."""
    message = worker_pb2.WorkerMessage()
    plain: list[SequenceStep] = []
    for step in steps:
        if step[_REST:] == _PLAIN:
            plain.append(step)
        else:
            _put_output(message.outputs.add(), step, now)
    if plain:
        _put_plain(message.plain, plain)
    if blocks is not None:
        message.blocks.reset = blocks.reset
        message.blocks.stored = blocks.stored
        message.blocks.removed = blocks.removed
    return message


def _put_plain(message: worker_pb2.PlainTokens, steps: Sequence[SequenceStep]) -> None:
    message.sequence_ids.extend([step.sequence_id for step in steps])
    message.offsets.extend([step.offset for step in steps])
    message.counts.extend([len(step.token_ids) for step in steps])
    message.token_ids.extend([token for step in steps for token in step.token_ids])
    message.texts.extend([step.text for step in steps])


def _put_output(message: worker_pb2.SequenceOutput, step: SequenceStep, now: float) -> None:
    message.sequence_id = step.sequence_id
    if step.offset:
        message.offset = step.offset
    message.token_ids.extend(step.token_ids)
    if step.text:
        message.text = step.text
    if step.logprobs:
        message.logprobs.extend(_token_logprobs(position) for position in step.logprobs)
    if step.finish_reason is not None:
        message.finish_reason = _FINISH[step.finish_reason]
    if isinstance(step.stop, str):
        message.stop_string = step.stop
    elif step.stop is not None:
        message.stop_token_id = step.stop
    if step.error is not None:
        message.error.CopyFrom(_error(step.error))
    if step.report is not None:
        message.report.CopyFrom(_report(step.report, now))


def _error(error: PdserveError) -> worker_pb2.SequenceError:
    return worker_pb2.SequenceError(
        code=status_of(error).grpc_code,
        message=str(error),
        retryable=error.retryable,
        shared=isinstance(error, HandoffRefused),
    )


def _token_logprobs(position: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        sampled=_logprob(position.sampled), top=[_logprob(entry) for entry in position.top]
    )


def _logprob(entry: Logprob) -> common_pb2.Logprob:
    return common_pb2.Logprob(
        token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, text=entry.text
    )


def _report(report: SequenceReport, now: float) -> worker_pb2.SequenceReport:
    def ago(stamp: float) -> float:
        return max(now - stamp, 0.0) if stamp else -1.0

    message = worker_pb2.SequenceReport(
        accepted_ago_seconds=ago(report.accepted_at),
        landed_ago_seconds=ago(report.landed_at),
        scheduled_ago_seconds=ago(report.scheduled_at),
        first_token_ago_seconds=ago(report.first_token_at),
        second_token_ago_seconds=ago(report.second_token_at),
        cached_prompt_tokens=report.cached_tokens,
    )
    if report.handoff is not None:
        message.handoff.CopyFrom(_handoff(report.handoff))
    return message


def _handoff(result: HandoffResult) -> common_pb2.HandoffReport:
    return common_pb2.HandoffReport(
        transport=result.transport,
        bytes=result.bytes,
        messages=result.frames,
        held_tokens=result.held_tokens,
        blocks=result.blocks,
        transfer_seconds=max(result.last_frame_at - result.first_frame_at, 0.0),
        elapsed_seconds=max(result.ended_at - result.granted_at, 0.0),
    )
