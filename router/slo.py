"""Which class a request is of, and what it is to reach. Pure."""

from __future__ import annotations

import math

from cluster.config_clients import ClassConfig, ClassesConfig
from cluster.errors import InvalidRequest, PermissionDenied
from router.admission.offers import SloClass
from router.generation import Slo, Urgency
from router.tenants import Tenant

MAX_PRIORITY = 100


def slo_of(classes: ClassesConfig, tenant: Tenant, urgency: Urgency, timeout_seconds: float) -> Slo:
    """The class that was asked for, or else the one that the deadline means.

    Raises:
        InvalidRequest: the priority or a target is out of its limits.
        PermissionDenied: the tenant may not ask for the class.
    """
    if not -MAX_PRIORITY <= urgency.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            "priority", f"must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, not {urgency.priority}"
        )
    for name in ("ttft_seconds", "tpot_seconds"):
        target = getattr(urgency, name)
        if target is not None and not (math.isfinite(target) and target > 0):
            raise InvalidRequest(f"targets.{name}", f"must be above 0, not {target:g}")
    slo_class = urgency.slo_class or _meant(classes, tenant, timeout_seconds)
    if slo_class not in tenant.classes:
        allowed = ", ".join(sorted(tenant.classes))
        raise PermissionDenied(
            f"slo_class: tenant {tenant.name} may not ask for {slo_class}; it may for {allowed}"
        )
    config: ClassConfig = getattr(classes, slo_class)
    return Slo(
        slo_class,
        urgency.priority,
        urgency.ttft_seconds or config.ttft_seconds or math.inf,
        urgency.tpot_seconds or config.tpot_seconds or math.inf,
    )


def _meant(classes: ClassesConfig, tenant: Tenant, timeout_seconds: float) -> SloClass:
    """By the deadline, as far as the tenant may use it."""
    order = [SloClass.STANDARD, SloClass.BATCH, SloClass.INTERACTIVE]
    if timeout_seconds <= classes.interactive_deadline_seconds:
        order.insert(0, SloClass.INTERACTIVE)
    return next(c for c in order if c in tenant.classes)
