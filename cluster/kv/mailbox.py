"""What the handoff agent's thread has for the engine's thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cluster.kv.handoff import HandoffResult


@dataclass
class Finished:
    """Requests by the engine's ids: what vLLM calls KVConnectorTransferResults.

    Attributes:
        first_tokens: of those of `recving` that have not failed.
    """

    sending: set[str] = field(default_factory=set)
    recving: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    first_tokens: dict[str, int] = field(default_factory=dict)


class Mailbox:
    """Filled by the agent, emptied by the engine as it steps. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received = threading.Event()
        self._finished = Finished()
        self._results: list[HandoffResult] = []
        self._granted: list[str] = []

    def granted(self, handoff_id: str) -> None:
        """Decode has room for a prefill request."""
        with self._lock:
            self._granted.append(handoff_id)

    def sent(self, request: str) -> None:
        """The prefill blocks of `request` may be freed."""
        with self._lock:
            self._finished.sending.add(request)

    def received(self, request: str, first_token: int | None) -> None:
        """The decode blocks of `request` are verified, and it goes on behind its first token; None:
        they are discarded."""
        with self._lock:
            self._finished.recving.add(request)
            if first_token is None:
                self._finished.failed.add(request)
            else:
                self._finished.first_tokens[request] = first_token
        self._received.set()

    def wait_received(self, seconds: float) -> None:
        """Until `received` is called, or was since the last wait, or so long."""
        self._received.wait(seconds)
        self._received.clear()

    def result(self, result: HandoffResult) -> None:
        with self._lock:
            self._results.append(result)

    def take_finished(self) -> Finished:
        with self._lock:
            finished, self._finished = self._finished, Finished()
            return finished

    def take_landed(self) -> dict[str, int]:
        """Of the finished ones only the requests whose blocks are verified: their first tokens."""
        with self._lock:
            landed, self._finished.first_tokens = self._finished.first_tokens, {}
            self._finished.recving -= landed.keys()
            return landed

    def take_granted(self) -> list[str]:
        with self._lock:
            granted, self._granted = self._granted, []
            return granted

    def take_results(self) -> list[HandoffResult]:
        with self._lock:
            results, self._results = self._results, []
            return results
