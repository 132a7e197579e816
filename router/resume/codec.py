"""What the store keeps of a stream, as JSON, and back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from cluster.clock import Clock
from cluster.errors import PdserveError, error_from_code, status_of
from cluster.ids import RequestId
from router.admission.offers import SloClass
from router.generation import Generation, Guide, Sampling, Slo
from router.output import (
    Completed,
    CompletionReport,
    Delta,
    FinishReason,
    Handoff,
    Logprob,
    Phases,
    TokenLogprobs,
)


def asked(generation: Generation, clock: Clock) -> str:
    """A request, with its times on the wall clock: another host's router may read it."""
    fields = asdict(generation)
    shift = clock.wall() - clock.now()
    fields["received_at"] += shift
    fields["deadline"] += shift
    return _json(fields)


def generation(raw: str, clock: Clock) -> Generation:
    """The request behind `asked`, on this host's clock."""
    fields = json.loads(raw)
    shift = clock.now() - clock.wall()
    sampling = fields.pop("sampling")
    guide = sampling.pop("guide")
    for name in ("stop", "stop_token_ids"):
        sampling[name] = tuple(sampling[name])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    slo = fields.pop("slo")
    made = Generation(
        **{
            **fields,
            "request_id": RequestId(fields["request_id"]),
            "prompt_token_ids": tuple(fields["prompt_token_ids"]),
            "sampling": Sampling(**sampling, guide=_guide(guide)),
            "slo": Slo(**{**slo, "slo_class": SloClass(slo["slo_class"])}),
        }
    )
    return replace(made, received_at=made.received_at + shift, deadline=made.deadline + shift)


def fingerprint(generation: Generation) -> str:
    """Equal for two requests that ask for the same, whatever their ids, times and urgency."""
    same = (
        generation.model,
        generation.prompt_token_ids,
        asdict(generation.sampling),
        generation.cache_salt,
    )
    return hashlib.sha256(_json(same).encode()).hexdigest()


def entry(delta: Delta) -> str:
    """A delta, without what it does not have."""
    fields: dict[str, Any] = {
        "i": delta.index,
        "o": delta.offset,
        "t": delta.token_ids,
        "x": delta.text,
        "c": delta.text_offset,
    }
    if delta.logprobs:
        fields["l"] = [[_flat(e.sampled), [_flat(top) for top in e.top]] for e in delta.logprobs]
    if delta.finish:
        fields["f"] = delta.finish
        fields["s"] = delta.stop
    return _json(fields)


def delta(raw: str) -> Delta:
    """The delta behind `entry`."""
    fields = json.loads(raw)
    logprobs = tuple(
        TokenLogprobs(Logprob(*sampled), tuple(Logprob(*each) for each in top))
        for sampled, top in fields.get("l", ())
    )
    finish = FinishReason(fields["f"]) if "f" in fields else None
    return Delta(
        fields["i"],
        fields["o"],
        tuple(fields["t"]),
        fields["x"],
        logprobs,
        finish,
        fields.get("s"),
        fields["c"],
    )


def end(result: Completed | PdserveError) -> str:
    """How a stream ended. Begins with `{"error":` if it failed."""
    if isinstance(result, Completed):
        return _json({"completed": asdict(result)})
    status = status_of(result)
    text = result.message if status.name != "INTERNAL" else "internal error"
    return _json({"error": [status.grpc_code, text]})


def ended(raw: str) -> Completed | PdserveError:
    """The end behind `end`."""
    fields = json.loads(raw)
    if "error" in fields:
        code, message = fields["error"]
        return error_from_code(code, message, retryable=False)
    completed = fields["completed"]
    reports = tuple(
        CompletionReport(
            **{
                **report,
                "phases": Phases(**report["phases"]),
                "handoff": Handoff(**report["handoff"]) if report["handoff"] else None,
            }
        )
        for report in completed.pop("completions")
    )
    return Completed(**completed, completions=reports)


def _guide(fields: dict[str, Any] | None) -> Guide | None:
    return None if fields is None else Guide(**{**fields, "choices": tuple(fields["choices"])})


def _flat(token: Logprob) -> list[object]:
    return [token.token_id, token.logprob, token.rank, token.text]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
