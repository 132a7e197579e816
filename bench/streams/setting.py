"""What all systems of a run share: the models, their workers, the loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import Config

LOAD, PROBE = "load", "probe"
SECRET = b"a secret of the router benchmark"
TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"
PROMPT = "Here are the codes:\n" + "calm-otter: 481516\n" * 6
TOKENS_PER_CHAR = 75 / 134
"""Of PROMPT, by that tokenizer."""

WORKER_ROLES = {"l-p": "prefill", "l-d0": "decode", "l-d1": "decode"}
PROBE_ROLES = {"x-p": "prefill", "x-d": "decode"}

VOCABULARY = 569
FINITE_SPEED = 0.25

Disaggregate = Literal["always", "auto", "never"]


@dataclass(frozen=True)
class Load:
    """Streams that run at once, each with a token every so often.

    Attributes:
        gap_seconds: between a stream's outputs; the engines' step.
        disaggregate: as the configuration's placement.disaggregate.
        tokens_per_output: the engines give so many of every stream with a step, after its first.
        finite: the engines have the limits and the times of real ones, those of an 8B model on a
            GPU of a quarter of an H200's speed, and `gap_seconds` says nothing.
    """

    streams: int
    gap_seconds: float
    disaggregate: Disaggregate = "always"
    tokens_per_output: int = 1
    finite: bool = False


def stand_in_ids(prompt: str) -> list[int]:
    """As many token ids as a prompt's tokenizer would give."""
    letters = prompt[: round(len(prompt) * TOKENS_PER_CHAR)]
    return [8 + ord(letter) % 500 for letter in letters]


def config(load: Load) -> Config:
    """The cluster of a run: a model under load, and one whose engine is always free, to probe."""
    model: dict[str, Any] = {"path": str(TOKENIZER), "engine": "simulated", "max_model_len": 4096}
    endless = {"max_num_seqs": 16_384, "max_num_batched_tokens": 1 << 20}
    steps = {"prefill_token_seconds": 0, "prefill_pair_seconds": 0, "decode_sequence_seconds": 0}
    quiet = {
        **steps,
        "decode_token_seconds": 0,
        "link_seconds": 1e-4,
        "num_blocks": 1 << 17,
        "vocab_size": VOCABULARY,
    }
    loaded = {**model, **endless, "simulation": {**quiet, "step_seconds": load.gap_seconds}}
    if load.finite:
        loaded = {**model, "simulation": {"speed": FINITE_SPEED, "vocab_size": VOCABULARY}}
    router: dict[str, Any] = {"grpc_port": 0, "http_port": 0}
    classes: dict[str, Any] = {}
    if not load.finite:
        router |= {"max_running_requests": 20_000, "max_queued_requests": 20_000}
        classes = {"standard": {"ttft_seconds": None, "tpot_seconds": None}}
    return Config(
        models=[
            {**loaded, "name": LOAD},
            {**model, **endless, "name": PROBE, "simulation": {**quiet, "step_seconds": 1e-3}},
        ],
        router=router,
        placement={"disaggregate": load.disaggregate},
        classes=classes,
    )
