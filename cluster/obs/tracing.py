"""Trace spans of requests, over OTLP where OTEL_EXPORTER_OTLP_ENDPOINT says so.

One span per request, one under it per phase of its first completion, and one for the KV handoff.
Spans are made when a request has ended, from its stamps; nothing is traced while it runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger(__name__)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_NANO = 1_000_000_000


@dataclass(frozen=True)
class Span:
    """A part of a request.

    Attributes:
        start, end: seconds since 1970.
    """

    name: str
    start: float
    end: float
    attributes: Mapping[str, str | int | float | bool]


class Tracer(Protocol):
    """Takes a request's spans, the request's own first. Never blocks, never raises."""

    def record(self, spans: Sequence[Span], failed: bool) -> None: ...


class OtlpTracer:
    """Hands spans to OpenTelemetry's batching exporter.

    Args:
        provider: an opentelemetry.sdk.trace.TracerProvider.
    """

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("pdserve")

    def record(self, spans: Sequence[Span], failed: bool) -> None:
        from opentelemetry import trace

        request, *parts = spans
        root = self._tracer.start_span(
            request.name, start_time=int(request.start * _NANO), attributes=dict(request.attributes)
        )
        if failed:
            root.set_status(trace.StatusCode.ERROR)
        under = trace.set_span_in_context(root)
        for part in parts:
            span = self._tracer.start_span(
                part.name,
                context=under,
                start_time=int(part.start * _NANO),
                attributes=dict(part.attributes),
            )
            span.end(int(part.end * _NANO))
        root.end(int(request.end * _NANO))


def tracer_from_environment(service: str) -> Tracer | None:
    """Exports where the environment names an endpoint; None where it names none."""
    if not os.environ.get(ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("%s is set, but traces need opentelemetry: %s", ENDPOINT, error)
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtlpTracer(provider)
