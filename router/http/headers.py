"""What HTTP callers say in headers, so that OpenAI's bodies stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

from aiohttp import web

from cluster.errors import InvalidRequest
from router.admission.offers import SloClass
from router.caller import certificate_names
from router.generation import Urgency
from router.tenants import Shown

CLASS_HEADER = "X-Slo-Class"
PRIORITY_HEADER = "X-Priority"
TTFT_HEADER = "X-Ttft-Target-Seconds"
IDEMPOTENCY_HEADER = "Idempotency-Key"
TPOT_HEADER = "X-Tpot-Target-Seconds"
MAX_SECONDS = 1e9
"""More than 30 years: what is far beyond it the store cannot keep a time for."""


def shown_by(request: web.Request) -> Shown:
    """The Authorization header, and the names in the client certificate, which TLS verified."""
    peer = request.transport and request.transport.get_extra_info("peercert")
    return Shown.from_header(request.headers.get("Authorization"), certificate_names(peer or {}))


def urgency(headers: Mapping[str, str]) -> Urgency:
    """Class, priority and targets. Raises InvalidRequest."""
    slo_class = headers.get(CLASS_HEADER)
    if slo_class is not None and slo_class not in list(SloClass):
        raise InvalidRequest(CLASS_HEADER, f"must be one of {', '.join(SloClass)}")
    priority = headers.get(PRIORITY_HEADER, "0")
    if not priority.removeprefix("-").isdecimal() or len(priority) > 5:
        raise InvalidRequest(PRIORITY_HEADER, "must be a whole number")
    return Urgency(
        None if slo_class is None else SloClass(slo_class),
        int(priority),
        seconds(headers, TTFT_HEADER),
        seconds(headers, TPOT_HEADER),
    )


def seconds(headers: Mapping[str, str], name: str) -> float | None:
    """None if the header is missing.

    Raises:
        InvalidRequest: it is no time above 0, or longer than MAX_SECONDS.
    """
    raw = headers.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise InvalidRequest(name, f"must be above 0 and at most {MAX_SECONDS:g} seconds")
    return value
