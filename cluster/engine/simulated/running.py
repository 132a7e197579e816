"""A request on a simulated engine: its tokens, and what of them its reader gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.engine.protocol import EngineOutput, EngineRequest
from cluster.engine.simulated.push import Push
from cluster.engine.simulated.scheduler import Sequence
from cluster.engine.simulated.tokens import TokenSource, text_of


@dataclass
class Running:
    """A request and its way out.

    Attributes:
        outputs: what `generate` gives.
        handed: the first token, from its handoff until it goes out with the second.
    """

    request: EngineRequest
    sequence: Sequence
    tokens: TokenSource
    outputs: asyncio.Queue[EngineOutput] = field(default_factory=asyncio.Queue)
    push: Push | None = None
    pushing: asyncio.Task[None] | None = None
    handed: list[int] = field(default_factory=list)

    @property
    def landed(self) -> bool:
        """Its KV came from another engine, and is here."""
        return self.sequence.remote and self.sequence.generated > 0

    def fail(self) -> None:
        """Its reader gets an error."""
        self.outputs.put_nowait(EngineOutput([], "", finish_reason="error"))

    def take(self, token: int) -> bool:
        """The sequence has one more token; True if that is its last.

        A first token from a handoff that is not the last waits for the second.
        """
        sequence, sampling = self.sequence, self.request.sampling
        stopped = token in sampling.stop_token_ids and sequence.generated > sampling.min_tokens
        full = sequence.generated >= sequence.output
        if self.push is not None and not self.push.first_token.done():
            if stopped:
                self.push.first_token.cancel()
            else:
                self.push.first_token.set_result(token)
        if sequence.remote and sequence.generated == 1 and not (stopped or full):
            self.handed = [token]
            return False
        tokens, self.handed = [*self.handed, token], []
        self.outputs.put_nowait(
            EngineOutput(
                tokens,
                "".join(map(text_of, tokens)),
                finish_reason="stop" if stopped else "length" if full else None,
                stop=token if stopped else None,
                scheduled_at=sequence.scheduled_at,
                cached_tokens=sequence.cached,
            )
        )
        return stopped or full
