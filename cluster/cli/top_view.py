"""What `pdserve top` shows of two looks: workers, pools and routers with their rates. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.cli.calls import RouterView, WorkerView
from cluster.cli.top_looks import Look

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Rates:
    """Tokens per second since the look before; None: the life was not seen then, or what it did."""

    prompt: float | None
    output: float | None


@dataclass(frozen=True)
class Worker:
    """A worker and its rates."""

    view: WorkerView
    rates: Rates

    @property
    def kv_share(self) -> float:
        """Of its KV blocks, that requests hold."""
        return self.view.engine_blocks_used / max(1, self.view.engine_blocks_total)


@dataclass(frozen=True)
class Pool:
    """The workers of one model in one role, together."""

    model: str
    role: str
    workers: int
    ready: int
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    pinned_bytes: int
    rates: Rates

    @property
    def kv_share(self) -> float:
        return self.blocks_used / max(1, self.blocks_total)


@dataclass(frozen=True)
class Router:
    """A router; `silent` says why it did not answer for itself, and is empty if it did."""

    view: RouterView
    silent: str

    @property
    def queued(self) -> int:
        return sum(self.view.queued_requests.values())


@dataclass(frozen=True)
class Frame:
    """One refresh.

    Attributes:
        wall: seconds since 1970.
        attainment: of the routers' last minute; None: nothing ended.
        requests: that it is the share of.
    """

    wall: float
    cluster: str
    store_reachable: bool
    workers: tuple[Worker, ...]
    pools: tuple[Pool, ...]
    routers: tuple[Router, ...]
    rates: Rates
    requests: int
    attainment: float | None

    @property
    def running_requests(self) -> int:
        """Of the routers that answered."""
        return sum(router.view.running_requests or 0 for router in self.routers)

    @property
    def queued_requests(self) -> int:
        return sum(router.queued for router in self.routers)

    def values(self) -> dict[str, Any]:
        """For `--json`; fields as in operator.proto, rates in tokens per second."""
        return {
            "at_seconds": self.wall,
            "cluster": self.cluster,
            "store_reachable": self.store_reachable,
            "running_requests": self.running_requests,
            "queued_requests": self.queued_requests,
            **_rates(self.rates),
            "attainment": self.attainment,
            "attainment_of_requests": self.requests,
            "pools": [
                {
                    **{name: value for name, value in asdict(pool).items() if name != "rates"},
                    **_rates(pool.rates),
                }
                for pool in self.pools
            ],
            "workers": [{**asdict(each.view), **_rates(each.rates)} for each in self.workers],
            "routers": [{**asdict(each.view), "silent": each.silent} for each in self.routers],
        }


def frame(before: Look, now: Look) -> Frame:
    """What `now` shows, its rates since `before`."""
    lives = {(w.worker_id, w.incarnation): w for w in before.view.workers}
    seconds = now.at - before.at
    workers = tuple(
        sorted(
            (
                Worker(w, _since(lives.get((w.worker_id, w.incarnation)), w, seconds))
                for w in now.view.workers
            ),
            key=lambda each: (*_pool_key(each.view), each.view.worker_id),
        )
    )
    routers = tuple(Router(r, now.silent.get(r.router_id, "")) for r in now.view.routers)
    lately = [r.view.lately for r in routers if r.view.lately is not None]
    ended = sum(each.requests for each in lately)
    return Frame(
        now.wall,
        now.view.cluster,
        now.view.store_reachable,
        workers,
        _pools(workers),
        routers,
        _together(each.rates for each in workers),
        ended,
        sum(each.attained for each in lately) / ended if ended else None,
    )


def _since(before: WorkerView | None, now: WorkerView, seconds: float) -> Rates:
    if before is None or not (before.connected and now.connected) or seconds <= 0:
        return Rates(None, None)

    def rate(earlier: int | None, later: int | None) -> float | None:
        return None if earlier is None or later is None else (later - earlier) / seconds

    return Rates(
        rate(before.prompt_tokens, now.prompt_tokens),
        rate(before.output_tokens, now.output_tokens),
    )


def _pools(workers: Sequence[Worker]) -> tuple[Pool, ...]:
    """Of workers in the pools' order."""
    members: dict[tuple[str, str], list[Worker]] = {}
    for each in workers:
        members.setdefault((each.view.model, each.view.role), []).append(each)
    return tuple(
        Pool(
            model,
            role,
            len(pool),
            sum(w.view.state == "ready" for w in pool),
            sum(w.view.running_sequences for w in pool),
            sum(w.view.waiting_sequences for w in pool),
            sum(w.view.engine_blocks_used for w in pool),
            sum(w.view.engine_blocks_total for w in pool),
            sum(w.view.pinned_bytes for w in pool),
            _together(w.rates for w in pool),
        )
        for (model, role), pool in members.items()
    )


def _together(rates: Iterable[Rates]) -> Rates:
    """The sums of those that are known."""
    known = list(rates)
    prompt = [each.prompt for each in known if each.prompt is not None]
    output = [each.output for each in known if each.output is not None]
    return Rates(sum(prompt) if prompt else None, sum(output) if output else None)


def _pool_key(view: WorkerView) -> tuple[str, int, str]:
    known = ROLES.index(view.role) if view.role in ROLES else len(ROLES)
    return view.model, known, view.role


def _rates(rates: Rates) -> dict[str, float | None]:
    return {
        "prompt_tokens_per_second": rates.prompt,
        "output_tokens_per_second": rates.output,
    }
