"""What each tenant uses of its limits."""

from __future__ import annotations

from collections import Counter

from cluster.errors import Overloaded
from router.admission.bucket import Bucket
from router.admission.policy import Limits, Policy

REQUESTS, TOKENS = "requests_per_second", "tokens_per_second"


class TenantBook:
    """Rates, running and waiting requests by tenant.

    With n routers each grants 1 / n of the rates and bounds, its `share`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._share = 1.0
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._running: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()

    def set_policy(self, now: float, policy: Policy) -> None:
        """Other limits; what a tenant has saved up or overdrawn is kept within them."""
        self._policy = policy
        self._resize(now)

    def set_share(self, now: float, share: float) -> None:
        if share == self._share:
            return
        self._share = share
        self._resize(now)

    def _resize(self, now: float) -> None:
        for (tenant, what), bucket in self._buckets.items():
            bucket.resize(now, *self._rate(tenant, what))

    def check(self, now: float, tenant: str) -> None:
        """Raises Overloaded if the tenant is over its rates or has too many waiting."""
        limits = self._limits(tenant)
        if self._queued[tenant] >= max(1.0, limits.max_queued * self._share):
            raise Overloaded(
                f"tenant {tenant} has {self._queued[tenant]} requests waiting, its limit", 1.0
            )
        for what in (REQUESTS, TOKENS):
            wait = self._bucket(tenant, what).wait_seconds(now)
            if wait > 0:
                limit = f"{getattr(limits, what):g} {what.replace('_', ' ')}"
                raise Overloaded(f"tenant {tenant} is over its limit of {limit}", wait)

    def queued(self, now: float, tenant: str, tokens: int) -> None:
        """A request of so many expected tokens waits; its rates are charged."""
        self._queued[tenant] += 1
        self._bucket(tenant, REQUESTS).take(now, 1)
        self.charge(now, tenant, tokens)

    def charge(self, now: float, tenant: str, tokens: int) -> None:
        """Corrects the charge by what was used beyond it; negative gives back."""
        self._bucket(tenant, TOKENS).take(now, tokens)

    def started(self, tenant: str) -> None:
        self._queued[tenant] -= 1
        self._running[tenant] += 1

    def yields(self, tenant: str) -> None:
        """A running request of it waits again."""
        self._running[tenant] -= 1
        self._queued[tenant] += 1

    def left(self, tenant: str, ran: bool) -> None:
        """A request of it has ended, running or waiting."""
        (self._running if ran else self._queued)[tenant] -= 1

    def may_run(self, tenant: str) -> bool:
        """It is below its concurrency limit."""
        limit = self._limits(tenant).max_running * self._share
        return self._running[tenant] < max(1.0, limit)

    def _limits(self, tenant: str) -> Limits:
        return self._policy.tenant(tenant).limits

    def _rate(self, tenant: str, what: str) -> tuple[float, float]:
        limits = self._limits(tenant)
        rate = getattr(limits, what) * self._share
        return rate, rate * limits.burst_seconds

    def _bucket(self, tenant: str, what: str) -> Bucket:
        bucket = self._buckets.get((tenant, what))
        if bucket is None:
            bucket = self._buckets[tenant, what] = Bucket(*self._rate(tenant, what))
        return bucket
