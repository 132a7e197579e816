"""One request of `pdserve bench`: what it asks, and its answer as it comes."""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from cluster.cli.bench_seen import Answered
from cluster.cli.timeline import PHASES
from cluster.simulator.outcome import Targets
from pdserve.v1 import common_pb2, inference_pb2


@dataclass
class Meter:
    """Counts what comes while it is open.

    Attributes:
        prompt_tokens: of prompts whose first token came.
    """

    open: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0


class Watch:
    """One request's messages as they come.

    Args:
        since: when it was due, of `time.perf_counter`: what it waited for here is in its times.
        prompt, output: its tokens, and those that are to come.

    Attributes:
        sent: when it was sent, of `time.perf_counter`; None: not yet.
    """

    def __init__(self, since: float, prompt: int, output: int, meter: Meter) -> None:
        self.sent: float | None = None
        self._since = since
        self._prompt = prompt
        self._output = output
        self._meter = meter
        self._first = self._last = 0.0
        self._tokens = 0
        self._gaps = array("d")
        self._wrong = ""
        self._completed: inference_pb2.Completed | None = None

    def saw(self, message: bytes) -> None:
        """A GenerateResponse."""
        try:
            response = inference_pb2.GenerateResponse.FromString(message)
        except DecodeError:
            self._wrong = "a message could not be read"
            return
        if response.HasField("completed"):
            self._completed = response.completed
            return
        delta = response.delta
        count = len(delta.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if delta.offset != self._tokens:
            self._wrong = "tokens were lost or repeated"
        meter = self._meter
        if self._tokens:
            self._gaps.append(now - self._last)
            self._gaps.extend((0.0,) * (count - 1))
        else:
            self._first = now
            self._gaps.extend((0.0,) * (count - 1))
            meter.prompt_tokens += self._prompt * meter.open
        self._last = now
        self._tokens += count
        meter.output_tokens += count * meter.open

    def end(self) -> tuple[Answered | None, str]:
        """The call is over: what it came to, or what was wrong with it."""
        ended = time.perf_counter()
        done = self._completed
        if done is None or not done.completions:
            return None, "the stream ended without its report"
        if self._wrong or self._tokens != self._output:
            return None, self._wrong or f"{self._tokens} tokens came, not {self._output}"
        report = done.completions[0]
        return (
            Answered(
                report.ttft_seconds,
                report.tpot_seconds,
                self._first - self._since,
                ended - self._since,
                self._gaps,
                done.usage.cached_prompt_tokens,
                tuple(getattr(report.phases, f"{name}_seconds") for name in PHASES),
                report.handoff.bytes if report.HasField("handoff") else None,
            ),
            "",
        )


def request_of(
    model: str, ids: list[int], output: int, slo_class: str, salt: str, own: Targets | None
) -> inference_pb2.GenerateRequest:
    """One whose answer has exactly `output` tokens; `own`: targets in place of its class's."""
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=inference_pb2.TokenIds(ids=ids),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
        slo_class=f"SLO_CLASS_{slo_class.upper()}",
        cache_salt=salt,
    )
    for name in ("ttft", "tpot"):
        if own is not None and math.isfinite(seconds := getattr(own, name)):
            setattr(request.targets, f"{name}_seconds", seconds)
    return request
