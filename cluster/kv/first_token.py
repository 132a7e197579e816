"""First tokens, which come to the decode engine with their handoffs."""

from __future__ import annotations

import threading


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
"""Of this engine process: the handoff agent writes, the model runner reads."""
