"""How classes and tenants are treated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.admission.offers import SloClass


@dataclass(frozen=True)
class Limits:
    """What one tenant may ask of the cluster; infinite where there is no limit.

    Attributes:
        requests_per_second, tokens_per_second: long-run rates; tokens are prompt and output.
        burst_seconds: so many seconds' worth may come at once after a pause.
        max_running: requests that run at once; more wait.
        max_queued: requests that wait; more are refused.
    """

    requests_per_second: float = math.inf
    tokens_per_second: float = math.inf
    burst_seconds: float = 10.0
    max_running: float = math.inf
    max_queued: float = math.inf


@dataclass(frozen=True)
class TenantPolicy:
    """A tenant's share where several want more than there is, and its limits."""

    weight: float = 1.0
    limits: Limits = Limits()


@dataclass(frozen=True)
class Policy:
    """All settings of admission.

    Attributes:
        max_running: requests that run at once, of all classes.
        max_queued: requests that wait, of each class; beyond, they are refused.
        patience_seconds: a class that waits and had no start for so long gets the next one. Batch
            gets it on top of what online work may use, one at a time.
        batch_share: of the capacity, that batch work fills at most.
        tenants: by name; the rest is treated as `TenantPolicy()`.
    """

    max_running: int = 1024
    max_queued: int = 1024
    patience_seconds: Mapping[SloClass, float] = field(
        default_factory=lambda: {
            SloClass.INTERACTIVE: math.inf,
            SloClass.STANDARD: 5.0,
            SloClass.BATCH: 60.0,
        }
    )
    batch_share: float = 0.8
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)

    def tenant(self, name: str) -> TenantPolicy:
        return self.tenants.get(name, _DEFAULT)


_DEFAULT = TenantPolicy()
