"""A profile: what a short run measured of one worker, and what it was measured on. JSON on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import InvalidRequest


@dataclass(frozen=True)
class PrefillSample:
    """One prefill of `new` tokens after `cached` ones, alone on its worker."""

    new: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class LaunchSample:
    """The start of one step of `new` prompt tokens behind another that was not told yet, on an
    engine that plans ahead: from its beginning to the next one's."""

    new: int
    seconds: float


@dataclass(frozen=True)
class DecodeSample:
    """One decode step for `batch` sequences that hold `context` tokens together."""

    batch: int
    context: int
    seconds: float


@dataclass(frozen=True)
class HandoffSample:
    """One handoff of `bytes` of KV, nothing of it hidden."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class PathSample:
    """What one request took outside of its steps, on its way through the cluster.

    Attributes:
        prompt: tokens; bytes: of KV that were handed off.
        before: seconds to its first token, less those of its prefill.
        between: seconds from its first token to its second.
    """

    prompt: int
    bytes: int
    before: float
    between: float

    @property
    def seconds(self) -> float:
        return self.before + self.between


@dataclass(frozen=True)
class SharedSample:
    """Steps of one worker while another worker's ran on the same cores.

    Attributes:
        step: prefill or decode: their kind; or dispatch, what one request took outside of them.
        alone: seconds that these steps take with nothing beside them.
        seconds: they took.
        beside: seconds of these in which the other worker had a step under way.
        handoffs: that came to the worker meanwhile.
    """

    step: str
    alone: float
    seconds: float
    beside: float
    handoffs: int = 0


@dataclass(frozen=True)
class Profile:
    """Samples, and the worker they belong to; a profile says nothing about any other.

    Attributes:
        chunk: tokens that a step computes; 0: not known, and every prompt counts as one step.
        ahead: the engine plans its steps one ahead, as vLLM's async scheduling does.
        graph_tokens: steps of no more tokens are replayed from CUDA graphs; 0: none is.
        shared: empty where workers have their own cores.
        launch: empty where the engine does not plan ahead.
    """

    model: str
    hardware: str
    tensor_parallel: int
    prefill: tuple[PrefillSample, ...]
    decode: tuple[DecodeSample, ...]
    handoff: tuple[HandoffSample, ...] = ()
    path: tuple[PathSample, ...] = ()
    shared: tuple[SharedSample, ...] = ()
    chunk: int = 0
    ahead: bool = False
    graph_tokens: int = 0
    launch: tuple[LaunchSample, ...] = ()

    def check(self, model: str, hardware: str, tensor_parallel: int) -> None:
        """Raises InvalidRequest unless it was measured on exactly this."""
        mine = (self.model, self.hardware.upper(), self.tensor_parallel)
        if mine != (model, hardware.upper(), tensor_parallel):
            raise InvalidRequest(
                "profile",
                f"was measured with {self.model} on {self.tensor_parallel} × {self.hardware}, not "
                f"with {model} on {tensor_parallel} × {hardware}; measure again with `pdserve "
                "profile`",
            )

    def to_json(self) -> str:
        return json.dumps({"version": 1, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, raw: str) -> Profile:
        """Raises InvalidRequest that says what is wrong with it."""
        try:
            values = json.loads(raw)
            if values.pop("version") != 1:
                raise ValueError("its version is not 1")
            profile = cls(
                model=values["model"],
                hardware=values["hardware"],
                tensor_parallel=values["tensor_parallel"],
                prefill=tuple(PrefillSample(**sample) for sample in values["prefill"]),
                decode=tuple(DecodeSample(**sample) for sample in values["decode"]),
                handoff=tuple(HandoffSample(**sample) for sample in values.get("handoff", ())),
                path=tuple(PathSample(**sample) for sample in values.get("path", ())),
                shared=tuple(SharedSample(**sample) for sample in values.get("shared", ())),
                chunk=int(values.get("chunk", 0)),
                ahead=bool(values.get("ahead", False)),
                graph_tokens=int(values.get("graph_tokens", 0)),
                launch=tuple(LaunchSample(**sample) for sample in values.get("launch", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("profile", f"is not a profile: {error!r}") from error
        for samples in (profile.prefill, profile.decode, profile.handoff, profile.path,
                        profile.shared, profile.launch):  # fmt: skip
            for sample in samples:
                _check_sample(sample)
        return profile


def _check_sample(sample: Any) -> None:
    seconds = sample.seconds
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds <= 0:
        raise InvalidRequest("profile", f"holds a sample of {seconds} s: {sample}")
