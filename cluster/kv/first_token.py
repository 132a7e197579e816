"""The first token, forced on decode.

Prefill samples the first token and the client has it at once; it comes to the decode engine with
the handoff. Decode recomputes the last prompt token to get going, and the token it samples then is
forced to be that one. So everything behind it – penalties, min_tokens, stop strings, the grammar,
the seeded generator's draws – finds the state it would have had in one engine.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from cluster.kv.handoff import HandoffParams


class FirstTokens:
    """First tokens by handoff id, from the commit of a handoff to the end of its request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[str, int] = {}

    def put(self, handoff_id: str, token_id: int) -> None:
        with self._lock:
            self._tokens[handoff_id] = token_id

    def get(self, handoff_id: str) -> int:
        """Raises KeyError if the handoff has not landed."""
        with self._lock:
            return self._tokens[handoff_id]

    def forget(self, handoff_id: str) -> None:
        with self._lock:
            self._tokens.pop(handoff_id, None)


FIRST_TOKENS = FirstTokens()
"""Of this engine process: the handoff agent writes, the logits processor reads."""


class _Force:
    def __init__(self, handoff_id: str) -> None:
        self._handoff_id = handoff_id

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if output_ids:
            return logits
        token = FIRST_TOKENS.get(self._handoff_id)
        logits.fill_(float("-inf"))
        # Not `logits[token] = 0.0`: that copies a number from the host, and so waits until the
        # device has computed the step, and the whole batch with it.
        logits.narrow(0, token, 1).fill_(0.0)
        return logits


class FirstTokenProcessor(AdapterLogitsProcessor):
    """Forces the first output token of requests that were handed off to this engine."""

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Requests that have their first token cost nothing any more."""
        for row in [row for row, force in self.req_info.items() if force.args[0]]:
            del self.req_info[row]
        return super().apply(logits)

    def new_req_logits_processor(self, params: SamplingParams) -> _Force | None:
        extra: dict[str, Any] = params.extra_args or {}
        handoff = HandoffParams.from_dict(extra.get("kv_transfer_params"))
        return _Force(handoff.handoff_id) if handoff and handoff.side == "decode" else None
