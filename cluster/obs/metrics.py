"""The router's metrics, in a registry of their own, with units in their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""vLLM's, so that the two can be laid over each other."""

TPOT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip

E2E_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

PHASE_BUCKETS = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip


SIZE_BUCKETS = tuple(float(1 << bits) for bits in range(16, 36, 2))
RATE_BUCKETS = tuple(float(10**power * step) for power in (7, 8, 9, 10, 11) for step in (1, 3))


Family = TypeVar("Family", Counter, Histogram)


class Labelled(Generic[Family]):
    """A family of counters or histograms whose members are looked up once.

    The library's own `labels` takes a lock and makes strings, two dozen times a request.
    """

    def __init__(self, family: Family) -> None:
        self._family: Family = family
        self._members: dict[tuple[str, ...], Family] = {}

    def labels(self, *values: str) -> Family:
        """The member with these values of its labels."""
        member = self._members.get(values)
        if member is None:
            member = self._members[values] = self._family.labels(*values)
        return member


class RouterMetrics:
    """What one router measures.

    Args:
        registry: takes the collectors; one per router.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Labelled(
            Counter(
                "pdserve_requests_total",
                "Requests by terminal gRPC status, refused ones included.",
                ("model", "status"),
                registry=registry,
            )
        )
        self.request_tokens = Labelled(
            Counter(
                "pdserve_request_tokens_total",
                "Tokens of requests: prompt, completion, and cached (part of prompt).",
                ("model", "kind"),
                registry=registry,
            )
        )
        self.phase = Labelled(
            Histogram(
                "pdserve_phase_seconds",
                "Where completions' time went; the phases add up to the end-to-end time.",
                ("phase",),
                buckets=PHASE_BUCKETS,
                registry=registry,
            )
        )
        self.ttft = Labelled(
            Histogram(
                "pdserve_ttft_seconds",
                "Request received to first token.",
                ("model",),
                buckets=TTFT_BUCKETS,
                registry=registry,
            )
        )
        self.publish = Labelled(
            Histogram(
                "pdserve_publish_seconds",
                "Request received to the first of what its user sees, where the request marks it.",
                ("model",),
                buckets=TTFT_BUCKETS,
                registry=registry,
            )
        )
        self.tpot = Labelled(
            Histogram(
                "pdserve_tpot_seconds",
                "Mean gap between the tokens after the first.",
                ("model",),
                buckets=TPOT_BUCKETS,
                registry=registry,
            )
        )
        self.e2e = Labelled(
            Histogram(
                "pdserve_e2e_seconds",
                "Request received to its end, of requests that succeeded.",
                ("model",),
                buckets=E2E_BUCKETS,
                registry=registry,
            )
        )
        self._slo(registry)
        self._placement(registry)
        self._handoffs(registry)
        self._gauges(registry)
        self._seen_workers: set[tuple[str, str, str]] = set()

    def _slo(self, registry: CollectorRegistry) -> None:
        """Attainment is attained / requests: what was refused or failed counts as missed."""
        self.slo_requests = Labelled(
            Counter(
                "pdserve_slo_requests_total",
                "Valid requests that have ended, refused ones included.",
                ("model", "class"),
                registry=registry,
            )
        )
        self.slo_attained = Labelled(
            Counter(
                "pdserve_slo_attained_total",
                "Requests that succeeded within all their targets.",
                ("model", "class"),
                registry=registry,
            )
        )
        self.slo_missed = Labelled(
            Counter(
                "pdserve_slo_missed_total",
                "The others: ttft, tpot, refused, failed, deadline or cancelled (by the client).",
                ("model", "class", "reason"),
                registry=registry,
            )
        )
        self.tenant_requests = Labelled(
            Counter(
                "pdserve_tenant_requests_total",
                "Requests of a tenant by terminal gRPC status.",
                ("tenant", "status"),
                registry=registry,
            )
        )
        self.tenant_tokens = Labelled(
            Counter(
                "pdserve_tenant_tokens_total",
                "Tokens of a tenant's requests: prompt, completion.",
                ("tenant", "kind"),
                registry=registry,
            )
        )

    def _placement(self, registry: CollectorRegistry) -> None:
        self.placements = Labelled(
            Counter(
                "pdserve_placements_total",
                "Sequences placed: split over two workers, whole on one, or prefill alone.",
                ("model", "kind"),
                registry=registry,
            )
        )
        self.prediction_error = Labelled(
            Histogram(
                "pdserve_prediction_error_seconds",
                "How far what was predicted at placement is from what was observed.",
                ("quantity",),
                buckets=PHASE_BUCKETS,
                registry=registry,
            )
        )

    def _handoffs(self, registry: CollectorRegistry) -> None:
        self.handoff_bytes = Labelled(
            Counter(
                "pdserve_handoff_bytes_total",
                "KV bytes that decode workers received.",
                ("transport",),
                registry=registry,
            )
        )
        self.handoff = Histogram(
            "pdserve_handoff_seconds",
            "A handoff's first byte to its last.",
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self.handoff_wait = Histogram(
            "pdserve_handoff_wait_seconds",
            "The part of a handoff that nothing hid.",
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self.handoff_size = Histogram(
            "pdserve_handoff_size_bytes",
            "KV bytes of a handoff.",
            buckets=SIZE_BUCKETS,
            registry=registry,
        )
        self.handoff_rate = Labelled(
            Histogram(
                "pdserve_handoff_rate_bytes_per_second",
                "KV bytes of a handoff over its first byte to its last.",
                ("transport",),
                buckets=RATE_BUCKETS,
                registry=registry,
            )
        )
        self.handoff_overlap = Histogram(
            "pdserve_handoff_overlap_ratio",
            "The share of a handoff that compute hid.",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0),
            registry=registry,
        )

    def _gauges(self, registry: CollectorRegistry) -> None:
        self.running_requests = Gauge(
            "pdserve_running_requests", "Requests admitted and not ended.", registry=registry
        )
        self.queued_requests = Gauge(
            "pdserve_queued_requests",
            "Requests waiting for admission.",
            ("class",),
            registry=registry,
        )
        self.workers = Gauge(
            "pdserve_workers",
            "Workers in the registry.",
            ("model", "role", "state"),
            registry=registry,
        )
        self.store_reachable = Gauge(
            "pdserve_store_reachable", "1 if the store answered last time.", registry=registry
        )
        self.retries = Counter(
            "pdserve_retries_total", "Sequences started anew.", ("model",), registry=registry
        )
        self.journal_dropped = Counter(
            "pdserve_journal_dropped_total",
            "Journal entries lost because the store was out or too slow.",
            registry=registry,
        )

    def count_workers(self, counts: Mapping[tuple[str, str, str], int]) -> None:
        """Sets the workers by (model, role, state); combinations that are gone become 0."""
        self._seen_workers |= counts.keys()
        for labels in self._seen_workers:
            self.workers.labels(*labels).set(counts.get(labels, 0))
