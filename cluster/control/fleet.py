"""Ray's side of a life: a placement group, a named actor in it, and how it ended."""

from __future__ import annotations

import asyncio
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import Config
from cluster.control.actors import Failure, RouterActor, Where, WorkerActor, first_line
from cluster.control.hosts import Host, Need, spoken_labels
from cluster.control.launch import Launch
from cluster.control.reconcile import Slot
from cluster.errors import ConfigError, PdserveError, Unavailable

STOP_GRACE_SECONDS = 15.0
"""What a stop may take beyond its drain."""

NAME_SECONDS = 10.0
"""Ray frees a dead actor's name within this."""

_SLIVER = 0.001
"""Of a CPU: Ray wants a bundle to reserve something."""


@dataclass(frozen=True)
class End:
    """How a life ended: `permanent` if another try cannot end otherwise.

    Attributes:
        log_tail: the last lines of its log, where it could still read them.
    """

    reason: str
    permanent: bool = False
    log_tail: tuple[str, ...] = ()


def drop_former_groups(cluster_name: str) -> None:
    """Removes the placement groups of a controller that died: Ray keeps them as long as the job.

    Those of a cluster of the same name in another namespace are listed too, and stay.
    """
    for entry in placement_group_table().values():
        if entry["name"].startswith(_named(cluster_name, "")) and entry["state"] != "REMOVED":
            with suppress(ValueError):  # none of that name is in this namespace
                remove_placement_group(get_placement_group(entry["name"]))


def restarted() -> bool:
    """Whether this actor had a life before that Ray has replaced."""
    with warnings.catch_warnings(action="ignore"):  # Ray calls something that it has deprecated
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def hosts() -> list[Host]:
    """The living nodes of the Ray cluster."""
    return [
        Host(node["NodeID"], node["NodeManagerAddress"], node["Resources"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def resource_names() -> list[str]:
    """Of the Ray cluster's resources."""
    return list(ray.cluster_resources())


def any_gpus() -> bool:
    """Whether some host has a GPU now."""
    return bool(ray.cluster_resources().get("GPU", 0))


def need_of(slot: Slot, gpu_hosts: bool) -> Need:
    """What a life of `slot` needs of its host.

    Args:
        gpu_hosts: there are some; without any, engines run on CPUs unless told otherwise.
    """
    pool = slot.pool
    bundle: dict[str, float] = {"CPU": pool.num_cpus or _SLIVER, **pool.resources}
    gpus = slot.num_gpus
    if gpus is None and slot.kind == "worker" and gpu_hosts:
        gpus = slot.gpus
    if gpus:
        bundle["GPU"] = gpus
    return Need(f"{slot.kind}/{slot.model}/{slot.role}", bundle, pool.labels, pool.placement)


class RayLife:
    """A running life. `ended` completes when its process is gone, and never raises.

    Args:
        aim: the node it should be on, if there is room; empty for none in particular.

    Attributes:
        lacks: why no host can take it, while none can.
        node_id: of the host it is on; empty while it waits for one.
        where: once its process exists.
    """

    def __init__(
        self,
        launch: Launch,
        slot: Slot,
        incarnation: str,
        namespace: str,
        need: Need,
        aim: str = "",
    ) -> None:
        self._launch = launch
        self._slot = slot
        self._incarnation = incarnation
        self._namespace = namespace
        self._actor: Any = None
        self.need = need
        self.aim = aim
        self.lacks = ""
        self.node_id = ""
        self.where: Where | None = None
        self.ended: asyncio.Task[End] = asyncio.create_task(self._live(), name=slot.slot_id)

    def waits_for(self) -> str:
        """What the cluster lacks so far, for people."""
        if self.node_id:
            return ""
        return f"for {_spoken(self.need)}" + (f"; {self.lacks}" if self.lacks else "")

    async def stop(self, drain_seconds: float) -> None:
        """Drains and ends it; kills it if that takes `STOP_GRACE_SECONDS` longer than granted."""
        if self._actor is not None:
            with suppress(RayError, TimeoutError):
                async with asyncio.timeout(drain_seconds + STOP_GRACE_SECONDS):
                    await self._actor.stop.remote(drain_seconds)
        await self.kill()

    async def reload(self, config: Config) -> str:
        """Tells a router of another configuration; one that is not up yet starts with it. What it
        could not take over, in words."""
        try:
            if self._actor is not None:
                await self._actor.reload.remote(config)
        except RayTaskError as error:
            return f"{self._slot.slot_id}: {_explain(error).reason}"
        except RayError:
            pass  # its next life begins with it
        return ""

    async def set_role(self, role: str, drain_seconds: float) -> int:
        """As `WorkerHost.set_role`. Raises Unavailable."""
        if self._actor is None:
            raise Unavailable("the worker has no process yet")
        try:
            async with asyncio.timeout(drain_seconds + STOP_GRACE_SECONDS):
                return int(await self._actor.set_role.remote(role, drain_seconds))
        except TimeoutError:
            raise Unavailable("the worker did not say that it has changed its role") from None
        except RayError as error:
            raise Unavailable(
                _explain(error).reason if isinstance(error, RayTaskError) else first_line(error)
            ) from error

    async def demand(self, mark: tuple[int, int] | None) -> Any:
        """A router's `DemandReport`; None if it cannot say."""
        if self._actor is None:
            return None
        with suppress(RayError):
            return await self._actor.demand.remote(mark)
        return None

    async def kill(self) -> None:
        """Ends it now. Its process group goes with it."""
        self.ended.cancel()
        await asyncio.wait([self.ended])

    async def _live(self) -> End:
        group = None
        try:
            group = placement_group(
                [dict(self.need.bundle)],
                strategy="STRICT_PACK",
                name=f"{self._name()}-{self._incarnation}",
                bundle_label_selector=[dict(self.need.labels)] if self.need.labels else None,
                _soft_target_node_id=self.aim or None,
            )
            await group.ready()
            self.node_id = placement_group_table(group)["bundles_to_node_id"][0]
            self._actor = await self._create(group)
            self.where = await self._actor.where.remote()
            failure: Failure | None = await self._actor.run.remote()
            if failure is None:
                return End("stopped by itself")
            return End(failure.reason, failure.permanent, failure.log_tail)
        except RayTaskError as error:
            return _explain(error)
        except RayActorError as error:
            return End(self._why_gone(error))
        except TimeoutError:
            return End(f"its former life's name was not free within {NAME_SECONDS:g} s")
        except (RayError, ValueError) as error:
            return End(f"Ray could not start it: {first_line(error)}")
        except Exception as error:  # one slot must not stop the reconciling of all
            return End(f"{type(error).__name__}: {first_line(error)}")
        finally:
            if self._actor is not None:
                with suppress(RayError):
                    ray.kill(self._actor)
            if group is not None:
                with suppress(RayError):
                    remove_placement_group(group)

    async def _create(self, group: Any) -> Any:
        bundle = self.need.bundle
        extra = {k: v for k, v in bundle.items() if k not in ("CPU", "GPU")}
        kind = WorkerActor if self._slot.kind == "worker" else RouterActor
        remote = ray.remote(kind).options(
            name=self._name(),
            namespace=self._namespace,
            max_restarts=0,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            resources=extra or None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        async with asyncio.timeout(NAME_SECONDS):
            while True:
                try:
                    return remote.remote(self._launch, self._slot, self._incarnation)
                except ValueError:  # the former life's name is not free yet
                    await asyncio.sleep(0.1)

    def _why_gone(self, error: RayActorError) -> str:
        if self.where is None and "No module named" in str(error):
            return (
                "pdserve is not installed on its host, or not for the same Python: install the same"
                " version there, or use one image for all hosts"
            )
        on = f" on host {self.where.host}" if self.where is not None and self.where.host else ""
        return f"its process{on} died (killed, out of memory or crashed), or its host is gone"

    def _name(self) -> str:
        return _named(self._launch.config.name, self._slot.slot_id)


def _named(cluster_name: str, slot_id: str) -> str:
    """What Ray knows a slot by. No cluster's name holds the slash, so none begins another's."""
    return f"pdserve/{cluster_name}/{slot_id}"


def _explain(error: RayTaskError) -> End:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, PdserveError):
        return End(str(cause), permanent=isinstance(cause, ConfigError))
    permanent = isinstance(cause, ImportError)
    return End(f"{type(cause).__name__}: {first_line(cause)}", permanent)


def _spoken(need: Need) -> str:
    wanted = [f"{amount:g} {name}" for name, amount in need.bundle.items() if amount > _SLIVER]
    wanted += filter(None, [spoken_labels(need.labels)])
    return ", ".join(wanted) or "Ray"
