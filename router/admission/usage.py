"""What the running requests take of the pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.admission.offers import Capacity, Offer, SloClass
from router.admission.shares import keep, places
from router.bounds import Bounds


@dataclass
class _Running:
    """A request that was admitted; `prefill_tokens` is 0 after its first token."""

    offer: Offer
    started_at: float
    prefill_tokens: float


@dataclass
class _Used:
    prefill_tokens: float = 0.0
    kv_tokens: float = 0.0
    output_tokens: float = 0.0
    sequences: int = 0
    requests: int = 0
    paces: Bounds = field(default_factory=Bounds)

    def add(self, running: _Running, sign: int) -> None:
        """Counts it in (1) or out (-1)."""
        self.prefill_tokens += sign * running.prefill_tokens
        self.kv_tokens += sign * running.offer.cost
        self.output_tokens += sign * running.offer.output_tokens
        self.sequences += sign * running.offer.completions
        self.requests += sign
        change = self.paces.add if sign > 0 else self.paces.remove
        change(running.offer.tpot_seconds, running.offer.completions)


class Usage:
    """Admitted requests, and whether another one fits beside them.

    A model whose pools hold nothing takes any request, however large: it would never fit otherwise.
    Promised ones are counted apart: they take nothing of the room of others.
    """

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._running: dict[str, _Running] = {}
        self._batch: dict[str, _Running] = {}
        self._promised: dict[str, _Running] = {}
        self._used: dict[str, _Used] = {}

    def set_max_running(self, max_running: int) -> None:
        """Requests that may run; those that do go on."""
        self._max_running = max_running

    def __len__(self) -> int:
        return len(self._running) + len(self._promised)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running or request_id in self._promised

    @property
    def promises(self) -> int:
        return len(self._promised)

    def fits(self, offer: Offer, capacity: Capacity, share: float = 1.0) -> bool:
        """Within a share of the capacity and of the requests that may run."""
        if len(self._running) >= max(1, int(self._max_running * share)):
            return False
        used = self._used.get(offer.model)
        if used is None or not used.requests:
            return True
        limit = capacity.scaled(share)
        prompt = min(offer.prompt_tokens, capacity.prefill_worker_tokens)
        return (
            (not used.prefill_tokens or used.prefill_tokens + prompt <= limit.prefill_tokens)
            and used.kv_tokens + offer.cost <= limit.kv_tokens
            and used.sequences + offer.completions <= limit.sequences
            and keep(used.paces, limit, offer)
        )

    def room_wait(self, offer: Offer, tokens: int, capacity: Capacity) -> float:
        """Seconds until so many more tokens of requests like `offer` find room to decode.

        By Little's law: what fills a room has left it after as long as one of it decodes.
        """
        used = self._used.get(offer.model)
        if used is None or (self._batch and offer.slo_class is not SloClass.BATCH):
            return 0.0  # Batch gives its place back.
        sequences = used.sequences + tokens * offer.completions / offer.cost
        room = min(capacity.sequences, places(used.paces, capacity))
        over = max((used.kv_tokens + tokens) / capacity.kv_tokens, sequences / room) - 1.0
        if over <= 0:
            return 0.0
        each = used.output_tokens / used.sequences
        return over * each * capacity.step_seconds(used.sequences)

    def start(self, now: float, offer: Offer, capacity: Capacity) -> None:
        prompt = min(offer.prompt_tokens, capacity.prefill_worker_tokens)
        self._take(_Running(offer, now, prompt))

    def promise(self, now: float, offer: Offer) -> None:
        """Starts it beside the others, for good: it does not yield."""
        self._promised[offer.request_id] = _Running(offer, now, 0)

    def first_token(self, now: float, request_id: str) -> tuple[Offer, float] | None:
        """Its prompt is computed: what it was, and the seconds since its start."""
        running = self._running.get(request_id)
        if running is None or not running.prefill_tokens:
            return None
        self._used[running.offer.model].prefill_tokens -= running.prefill_tokens
        running.prefill_tokens = 0
        return running.offer, now - running.started_at

    def end(self, request_id: str) -> Offer | None:
        """What ended; None if it does not run."""
        if running := self._promised.pop(request_id, None):
            return running.offer
        running = self._running.pop(request_id, None)
        if running is None:
            return None
        self._batch.pop(request_id, None)
        used = self._used[running.offer.model]
        used.add(running, -1)
        if not used.requests:
            del self._used[running.offer.model]
        return running.offer

    def yielding(self, offer: Offer, capacity: Capacity) -> list[str]:
        """The batch requests to end so that `offer` fits, youngest first; none if none would do."""
        chosen: list[_Running] = []
        for running in reversed(list(self._batch.values())):
            if self.fits(offer, capacity):
                break
            if len(self._running) >= self._max_running or running.offer.model == offer.model:
                self.end(running.offer.request_id)
                chosen.append(running)
        enough = bool(chosen) and self.fits(offer, capacity)
        for running in reversed(chosen):
            self._take(running)
        return [running.offer.request_id for running in chosen] if enough else []

    def _take(self, running: _Running) -> None:
        offer = running.offer
        self._running[offer.request_id] = running
        if offer.slo_class is SloClass.BATCH:
            self._batch[offer.request_id] = running
        self._used.setdefault(offer.model, _Used()).add(running, 1)
