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
WORKER_ROLES = {"l-p": "prefill", "l-d0": "decode", "l-d1": "decode"}
PROBE_ROLES = {"x-p": "prefill", "x-d": "decode"}


Disaggregate = Literal["always", "auto", "never"]


@dataclass(frozen=True)
class Load:
    """Streams that run at once, each with a token every so often.

    Attributes:
        gap_seconds: between a stream's tokens; the engines' step.
        disaggregate: as the configuration's placement.disaggregate.
    """

    streams: int
    gap_seconds: float
    disaggregate: Disaggregate = "always"

    @property
    def tokens_per_second(self) -> float:
        return self.streams / self.gap_seconds


def config(load: Load) -> Config:
    """The cluster of a run: a model under load, and one whose engine is always free, to probe."""
    common: dict[str, Any] = {
        "path": str(TOKENIZER),
        "engine": "simulated",
        "max_model_len": 4096,
        "max_num_seqs": 16_384,
        "max_num_batched_tokens": 16_384,
    }
    steps = {"prefill_token_seconds": 0, "prefill_pair_seconds": 0, "decode_sequence_seconds": 0}
    quiet = {
        **steps,
        "decode_token_seconds": 0,
        "link_seconds": 1e-4,
        "num_blocks": 1 << 17,
        "vocab_size": 569,
    }
    return Config(
        models=[
            {**common, "name": LOAD, "simulation": {**quiet, "step_seconds": load.gap_seconds}},  # type: ignore[list-item]
            {**common, "name": PROBE, "simulation": {**quiet, "step_seconds": 1e-3}},  # type: ignore[list-item]
        ],
        router={  # type: ignore[arg-type]
            "grpc_port": 0,
            "http_port": 0,
            "max_running_requests": 20_000,
            "max_queued_requests": 20_000,
        },
        placement={"disaggregate": load.disaggregate},  # type: ignore[arg-type]
        classes={"standard": {"ttft_seconds": None, "tpot_seconds": None}},  # type: ignore[arg-type]
    )
