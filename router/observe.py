"""What is written down of a request: metrics, a log line, a journal entry. Never its text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from cluster.clock import Clock
from cluster.errors import Overloaded, PdserveError, Unavailable, status_of
from cluster.obs.metrics import RouterMetrics
from cluster.obs.tracing import Tracer
from cluster.store.records import JournalEntry
from router.admission.offers import SloClass
from router.attainment import ATTAINED, missed
from router.demand import DemandLog, Kind
from router.generation import Generation, Slo
from router.lately import Lately
from router.output import Completed, CompletionReport, Handoff
from router.running import Running
from router.spans import overlap, request_spans

JOURNAL_QUEUE = 4096
JOURNAL_TIMEOUT_SECONDS = 2.0
JOURNAL_BATCH, JOURNAL_EVERY_SECONDS = 512, 0.1
"""Entries are written together; of a request that ends meanwhile, the last one."""

log = logging.getLogger(__name__)


class Journal(Protocol):
    """Where requests' entries go; raises Unavailable when the store is out."""

    async def record(self, entries: Sequence[JournalEntry]) -> None: ...


class Observer:
    """Takes note of requests without ever holding one up."""

    def __init__(
        self,
        metrics: RouterMetrics,
        router_id: str,
        clock: Clock,
        tracer: Tracer | None = None,
    ) -> None:
        self.metrics = metrics
        self._tracer = tracer
        self._router_id = router_id
        self._clock = clock
        self._entries: asyncio.Queue[JournalEntry] = asyncio.Queue(JOURNAL_QUEUE)
        self.demand = DemandLog()
        self.lately = Lately(clock.now())
        self.readers: list[Callable[[Running], None]] = []
        """Hear of every request at its end."""

    def watch(self, running: Callable[[], int], queued: Callable[[SloClass], int]) -> None:
        """Where the numbers of requests are read, when somebody asks for the metrics."""
        self.metrics.running_requests.set_function(running)
        for slo_class in SloClass:
            gauge = self.metrics.queued_requests.labels(slo_class)
            gauge.set_function(partial(queued, slo_class))

    def received(self, running: Running) -> None:
        generation = running.generation
        prompt, allowed = len(generation.prompt_token_ids), generation.max_tokens
        now, kind = self._clock.now(), _kind(generation)
        self.demand.arrived(now, running.key, kind, prompt, allowed * generation.sampling.n)
        self._journal(self._entry(running))

    def retried(self, running: Running) -> None:
        self.metrics.retries.labels(running.generation.model).inc()

    def prompt_computed(self, running: Running) -> None:
        self.demand.computed(running.key)

    def refused(self, model: str, tenant: str, slo: Slo | None, error: BaseException) -> None:
        """A request that was never taken in.

        Args:
            model, tenant: known names, or empty.
            slo: as far as it was known what was asked for.
        """
        status = status_of(error).name
        self.metrics.requests.labels(model, status).inc()
        if tenant:
            self.metrics.tenant_requests.labels(tenant, status).inc()
        if slo is not None and isinstance(error, PdserveError):
            self._attainment(model, slo, error)
            if model and isinstance(error, Overloaded):
                self.demand.refused(self._clock.now(), (model, slo.slo_class.value))

    def ended(self, running: Running, end: Completed | PdserveError) -> None:
        generation = running.generation
        self.demand.computed(running.key)
        for hears in self.readers:
            hears(running)
        status = "OK" if isinstance(end, Completed) else status_of(end).name
        self.metrics.requests.labels(generation.model, status).inc()
        tokens = self.metrics.request_tokens
        tokens.labels(generation.model, "prompt").inc(len(generation.prompt_token_ids))
        tokens.labels(generation.model, "completion").inc(running.request.tokens)
        self._tenant(running, status)
        self._attainment(generation.model, generation.slo, end)
        seconds = self._clock.now() - generation.received_at
        phases: dict[str, float] = {}
        fields: dict[str, object] = {
            "request_id": generation.request_id,
            "tenant": generation.tenant,
            "model": generation.model,
            "class": generation.slo.slo_class.value,
            "status": status,
            "prompt_tokens": len(generation.prompt_token_ids),
            "completion_tokens": running.request.tokens,
            "seconds": round(seconds, 6),
        }
        if isinstance(end, Completed):
            self.metrics.e2e.labels(generation.model).observe(seconds)
            tokens.labels(generation.model, "cached").inc(end.cached_prompt_tokens)
            for report in end.completions:
                self._completion(generation.model, report)
            allowed = generation.max_tokens * generation.sampling.n
            cached = end.cached_prompt_tokens / max(1, len(generation.prompt_token_ids))
            used = end.completion_tokens / allowed
            self.demand.completed(_kind(generation), used, min(1.0, cached))
            first = end.completions[0]
            fields["ttft_seconds"] = round(first.ttft_seconds, 6)
            phases = dict(vars(first.phases))
        else:
            fields["error"] = str(end)
        error = "" if isinstance(end, Completed) else status
        self._journal(self._entry(running, running.request.tokens, error, phases))
        log.info("request ended", extra={"fields": fields})
        self._trace(running, end, fields, seconds)

    def _trace(
        self,
        running: Running,
        end: Completed | PdserveError,
        fields: dict[str, object],
        seconds: float,
    ) -> None:
        if self._tracer is None:
            return
        now = self._clock.wall()
        attributes = {
            f"pdserve.{k}": v for k, v in fields.items() if isinstance(v, str | int | float)
        }
        completed = end if isinstance(end, Completed) else None
        spans = request_spans(now - seconds, now, attributes, completed)
        self._tracer.record(spans, failed=completed is None)

    async def write_journal(self, journal: Journal) -> None:
        """Writes entries until cancelled; drops and counts those that the store does not take."""
        while True:
            entries = [await self._entries.get()]
            while not self._entries.empty() and len(entries) < JOURNAL_BATCH:
                entries.append(self._entries.get_nowait())
            latest = {(entry.tenant, entry.request_id): entry for entry in entries}
            try:
                async with asyncio.timeout(JOURNAL_TIMEOUT_SECONDS):
                    await journal.record(list(latest.values()))
            except (Unavailable, TimeoutError):
                self.metrics.journal_dropped.inc(len(entries))
            except Exception:
                self.metrics.journal_dropped.inc(len(entries))
                log.exception("journal entries not written")
            finally:
                for _ in entries:
                    self._entries.task_done()
            await asyncio.sleep(JOURNAL_EVERY_SECONDS)

    async def flush(self, seconds: float) -> None:
        """Waits until the journal is written, at most so long."""
        try:
            await asyncio.wait_for(self._entries.join(), seconds)
        except TimeoutError:
            self.metrics.journal_dropped.inc(self._entries.qsize())

    def _tenant(self, running: Running, status: str) -> None:
        tenant = running.generation.tenant
        self.metrics.tenant_requests.labels(tenant, status).inc()
        tokens = self.metrics.tenant_tokens
        tokens.labels(tenant, "prompt").inc(len(running.generation.prompt_token_ids))
        tokens.labels(tenant, "completion").inc(running.request.tokens)

    def _attainment(self, model: str, slo: Slo, end: Completed | PdserveError) -> None:
        reason = missed(slo, end)
        if reason is None:
            return
        self.metrics.slo_requests.labels(model, slo.slo_class).inc()
        ends = end.completions if isinstance(end, Completed) else ()
        self.lately.ended(
            self._clock.now(),
            reason,
            [report.ttft_seconds for report in ends],
            [report.tpot_seconds for report in ends if report.tokens > 1],
        )
        if model:
            self.demand.counted((model, slo.slo_class.value), reason == ATTAINED)
        if reason == ATTAINED:
            self.metrics.slo_attained.labels(model, slo.slo_class).inc()
        else:
            self.metrics.slo_missed.labels(model, slo.slo_class, reason).inc()

    def _completion(self, model: str, report: CompletionReport) -> None:
        self.metrics.ttft.labels(model).observe(report.ttft_seconds)
        if report.tokens > 1:
            self.metrics.tpot.labels(model).observe(report.tpot_seconds)
        if report.publish_seconds is not None:
            self.metrics.publish.labels(model).observe(report.publish_seconds)
        for phase, seconds in vars(report.phases).items():
            self.metrics.phase.labels(phase).observe(seconds)
        if report.handoff is not None:
            self._handoff(report, report.handoff)

    def _handoff(self, report: CompletionReport, moved: Handoff) -> None:
        self.metrics.handoff_bytes.labels(moved.transport).inc(moved.bytes)
        self.metrics.handoff.observe(moved.transfer_seconds)
        self.metrics.handoff_wait.observe(report.phases.handoff_wait)
        self.metrics.handoff_overlap.observe(overlap(report))
        self.metrics.handoff_size.observe(moved.bytes)
        if moved.transfer_seconds > 0:
            rate = moved.bytes / moved.transfer_seconds
            self.metrics.handoff_rate.labels(moved.transport).observe(rate)

    def _entry(
        self,
        running: Running,
        tokens: int = 0,
        error: str = "",
        phases: dict[str, float] | None = None,
    ) -> JournalEntry:
        generation = running.generation
        return JournalEntry(
            request_id=generation.request_id,
            tenant=generation.tenant,
            model=generation.model,
            state=running.request.state.value,
            router_id=self._router_id,
            prompt_tokens=len(generation.prompt_token_ids),
            slo_class=generation.slo.slo_class.value,
            completion_tokens=tokens,
            received_at=running.received_wall,
            updated_at=self._clock.wall(),
            error=error,
            phases=phases or {},
        )

    def _journal(self, entry: JournalEntry) -> None:
        try:
            self._entries.put_nowait(entry)
        except asyncio.QueueFull:
            self.metrics.journal_dropped.inc()


def _kind(generation: Generation) -> Kind:
    return generation.model, generation.slo.slo_class.value
