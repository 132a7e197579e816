"""Between the Inference service's messages and the router's own values."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.errors import InvalidRequest
from pdserve.v1 import common_pb2, inference_pb2
from router import validate
from router.admission.offers import SloClass
from router.generation import Ask, ChatMessage, Guide, Prompt, Sampling, Urgency
from router.output import Completed, CompletionReport

_CLASSES = {
    common_pb2.SLO_CLASS_INTERACTIVE: SloClass.INTERACTIVE,
    common_pb2.SLO_CLASS_STANDARD: SloClass.STANDARD,
    common_pb2.SLO_CLASS_BATCH: SloClass.BATCH,
}
_OPTIONAL_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "skip_special_tokens",
)


def refuse_unknown_fields(message: Message) -> None:
    """Clients supply what the schema has and nothing else, least of all a transfer field.

    Raises:
        InvalidRequest: `message` or one inside it carries a field that the schema does not have.
    """
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() != message.ByteSize():
        _name_unknown_field(message, "")


def _name_unknown_field(message: Message, path: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise InvalidRequest(path or "request", f"has an unknown field, number {number}")
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None or kind.GetOptions().map_entry:
            continue
        inner = f"{path}.{field.name}" if path else field.name
        for each in value if field.is_repeated else (value,):
            _name_unknown_field(each, inner)


def ask(
    request: inference_pb2.GenerateRequest, received_at: float, timeout_seconds: float | None
) -> Ask:
    """What `request` asks for. Raises InvalidRequest for unknown fields and a missing prompt."""
    validate.check_message_count(len(request.chat.messages))
    refuse_unknown_fields(request)
    return Ask(
        model=request.model,
        prompt=prompt(request),
        sampling=_sampling(request.sampling),
        received_at=received_at,
        timeout_seconds=timeout_seconds,
        request_id=request.request_id,
        cache_salt=request.cache_salt,
        urgency=_urgency(request),
        idempotency_key=request.idempotency_key,
        resumable=request.resumable,
        publish_after=_publish_after(request),
    )


def _urgency(request: inference_pb2.GenerateRequest) -> Urgency:
    if request.slo_class and request.slo_class not in _CLASSES:
        raise InvalidRequest("slo_class", f"{request.slo_class} is not a class")
    targets = request.targets
    return Urgency(
        _CLASSES.get(request.slo_class),
        request.priority,
        targets.ttft_seconds if targets.HasField("ttft_seconds") else None,
        targets.tpot_seconds if targets.HasField("tpot_seconds") else None,
    )


def _publish_after(request: inference_pb2.GenerateRequest) -> str | int | None:
    mark = request.WhichOneof("publish_after")
    return getattr(request, mark) if mark else None


def prompt(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt:
    """Raises InvalidRequest if it has none."""
    match request.WhichOneof("prompt"):
        case "text":
            return Prompt(text=request.text)
        case "chat":
            turns = (ChatMessage(m.role, m.content) for m in request.chat.messages)
            return Prompt(chat=tuple(turns))
        case "token_ids" if isinstance(request, inference_pb2.GenerateRequest):
            return Prompt(token_ids=tuple(request.token_ids.ids))
    raise InvalidRequest("prompt", "is required: text, chat or token_ids")


def completed_message(request_id: str, completed: Completed) -> inference_pb2.GenerateResponse:
    message = inference_pb2.Completed(
        usage=inference_pb2.Usage(
            prompt_tokens=completed.prompt_tokens,
            completion_tokens=completed.completion_tokens,
            cached_prompt_tokens=completed.cached_prompt_tokens,
        ),
        completions=map(_completion_report, completed.completions),
    )
    return inference_pb2.GenerateResponse(request_id=request_id, completed=message)


def _completion_report(report: CompletionReport) -> inference_pb2.CompletionReport:
    phases = {f"{name}_seconds": value for name, value in vars(report.phases).items()}
    message = inference_pb2.CompletionReport(
        index=report.index,
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        phases=common_pb2.PhaseTimes(**phases),
        ttft_seconds=report.ttft_seconds,
        tpot_seconds=report.tpot_seconds,
        publish_seconds=report.publish_seconds,
    )
    if report.handoff is not None:
        message.handoff.CopyFrom(common_pb2.HandoffReport(**vars(report.handoff)))
    return message


def _sampling(message: common_pb2.SamplingParams) -> Sampling:
    optional: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)
    }
    return Sampling(
        min_tokens=message.min_tokens,
        n=message.n if message.HasField("n") else 1,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop_str_in_output=message.include_stop_str_in_output,
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(message.logit_bias.items()),
        guide=_guide(message.guide) if message.HasField("guide") else None,
        **optional,
    )


def _guide(message: common_pb2.Guide) -> Guide | None:
    match message.WhichOneof("kind"):
        case "json_schema":
            return Guide("json_schema", message.json_schema)
        case "regex":
            return Guide("regex", message.regex)
        case "grammar":
            return Guide("grammar", message.grammar)
        case "choice":
            return Guide("choice", choices=tuple(message.choice.choices))
        case "json_object" if message.json_object:
            return Guide("json_object")
    return None
