"""What `pdserve top` and `pdserve status` see: looks at the cluster and at each of its routers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.calls import ClusterView, RouterView, cluster_view
from cluster.errors import DeadlineExceeded, PdserveError, Unavailable

LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Look:
    """The cluster at one moment.

    Attributes:
        at: CLOCK_MONOTONIC seconds at which the workers' numbers came.
        wall: seconds since 1970.
        silent: why a router did not answer, by its id.
    """

    at: float
    wall: float
    view: ClusterView
    silent: dict[str, str]


class Watcher:
    """Looks when asked. An async context manager: it keeps its channels open.

    Args:
        address: of a router's Operator API; when it goes away, others that it named are asked.
        token: of the operator, where PDSERVE_TOKEN is not set.
        seconds: within which a router answers about the cluster; None: LOOK_SECONDS.
    """

    def __init__(self, address: str, token: str, seconds: float | None = None) -> None:
        self._token = token
        self._seconds = seconds
        self._known = [address]
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(each.close() for each in self._channels.values()))

    async def look(self) -> Look:
        """Asks one router about the cluster, and the others about themselves.

        Raises:
            PdserveError: no router answered, or one refused to.
        """
        view = await self._view()
        at, wall = time.monotonic(), time.time()
        first, *others = view.routers
        asked = await asyncio.gather(*(self._own(router) for router in others))
        silent = {
            router.router_id: answer
            for router, answer in zip(others, asked, strict=True)
            if isinstance(answer, str)
        }
        routers = tuple(
            router if isinstance(answer, str) else answer
            for router, answer in zip(others, asked, strict=True)
        )
        # The first one goes by the address that reached it: others may know it by another.
        self._known = [self._known[0], *(r.operator_address for r in others)]
        return Look(at, wall, replace(view, routers=(first, *routers)), silent)

    async def _view(self) -> ClusterView:
        """Of the first router that answers, which is the first to be asked from now on."""
        failure: PdserveError = Unavailable("no router answers")
        for address in list(self._known):
            try:
                view = await cluster_view(self._channel(address), self._seconds or LOOK_SECONDS)
            except (Unavailable, DeadlineExceeded) as error:
                failure = error
                await self._give_up(address)
                continue
            self._known.remove(address)
            self._known.insert(0, address)
            return view
        raise failure

    async def _own(self, router: RouterView) -> RouterView | str:
        address = router.operator_address
        try:
            view = await cluster_view(self._channel(address), LOOK_SECONDS, router_only=True)
        except PdserveError as error:
            await self._give_up(address)
            return error.message
        return view.routers[0]

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = channel(address, self._token)
        return self._channels[address]

    async def _give_up(self, address: str) -> None:
        """The next look connects anew at once: gRPC itself would wait longer and longer."""
        if (given_up := self._channels.pop(address, None)) is not None:
            await given_up.close()
