"""What two simulated engines say to each other about a handoff: a line of JSON each, over TCP.

prefill                       decode
  offer(ticket)     ───────►  signature, expiry, worker, incarnation, layout, used once?
                              waits until its scheduler has reserved the blocks
                    ◄───────  grant(held tokens)
  … the time that the transfer takes …
  commit(first token) ─────►  lets the request run
                    ◄───────  ack, or refused(reason) at any point
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import HandoffRefused

TRANSPORT = "simulated"
MAX_LINE_BYTES = 16 << 10


@dataclass
class Line:
    """One connection: messages out and in, each within the handoff's life."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def say(self, kind: str, **values: Any) -> None:
        self.writer.write(json.dumps({"kind": kind, **values}).encode() + b"\n")

    async def hear(self, kind: str) -> dict[str, Any]:
        """The next message. Raises HandoffRefused unless it is of this kind."""
        try:
            raw = await self.reader.readline()
            message = json.loads(raw) if raw else {"kind": "refused", "reason": "the peer is gone"}
        except (OSError, ValueError) as error:
            raise HandoffRefused(f"the peer cannot be understood: {error}") from error
        if not isinstance(message, dict) or message.get("kind") != kind:
            reason = message.get("reason") if isinstance(message, dict) else None
            raise HandoffRefused(str(reason or f"expected {kind}"))
        return message

    def close(self) -> None:
        self.writer.close()


async def connect(address: str) -> Line:
    """Raises HandoffRefused if nobody answers."""
    host, _, port = address.rpartition(":")
    try:
        return Line(*await asyncio.open_connection(host, int(port), limit=MAX_LINE_BYTES))
    except OSError as error:
        raise HandoffRefused(f"the decode engine does not answer: {error}") from error
