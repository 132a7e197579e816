"""Prefill's side of a simulated handoff."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from cluster.engine.simulated.timing import Timing
from cluster.engine.simulated.wire import TRANSPORT, connect
from cluster.errors import HandoffRefused, PdserveError
from cluster.kv.handoff import HandoffParams, HandoffResult


@dataclass
class Push:
    """One handoff on its way out.

    The transfer runs beside the compute, as it does between real engines: what of it is exposed is
    the rest that is left when the first token is sampled, the last chunk's at least.

    Attributes:
        chunk: prompt tokens per engine step.
        first_token: set by the engine when it is sampled; cancelled when there is nothing to push.
    """

    params: HandoffParams
    timing: Timing
    chunk: int
    first_token: asyncio.Future[int]

    async def run(self) -> HandoffResult:
        """How it ended; never raises but for cancellation."""
        try:
            async with asyncio.timeout(self.params.expires_in):
                return await self._run()
        except PdserveError as error:
            return self._result(str(error))
        except TimeoutError:
            return self._result("the handoff's time is over")

    async def _run(self) -> HandoffResult:
        line = await connect(self.params.peers[0])
        try:
            line.say("offer", ticket=self.params.ticket)
            grant = await line.hear("grant")
            granted_at = time.monotonic()
            moved = max(0, self.params.num_tokens - int(grant["held"]))
            token = await asyncio.shield(self.first_token)
            sampled_at = time.monotonic()
            arrives = max(
                granted_at + self.timing.handoff(moved),
                sampled_at + self.timing.handoff(min(moved, self.chunk)),
            )
            await asyncio.sleep(arrives - sampled_at)
            line.say("commit", token=token)
            await line.hear("ack")
            return self._result("", granted_at, moved)
        except asyncio.CancelledError:
            if self.first_token.cancelled():
                raise HandoffRefused("the completion ended with its first token") from None
            raise
        finally:
            line.close()

    def _result(self, error: str, granted_at: float = 0.0, moved: int = 0) -> HandoffResult:
        return HandoffResult(
            self.params.handoff_id,
            "prefill",
            error,
            TRANSPORT,
            bytes=moved * self.timing.bytes_per_token,
            granted_at=granted_at,
            ended_at=time.monotonic(),
        )
