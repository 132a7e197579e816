"""Which host a life should go to, and why none can take it. Pure.

Ray places; this only says which host it should prefer, and names what is missing while Ray waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

NODE_ID = "ray.io/node-id"
"""A label that Ray gives every node."""

Bundle = Mapping[str, float]
"""Resources by name, as Ray counts them."""


@dataclass(frozen=True)
class Host:
    """A living node of the Ray cluster.

    Attributes:
        resources: all it has, taken or not.
    """

    node_id: str
    address: str
    resources: Bundle
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Need:
    """What a life needs of its host.

    Attributes:
        pool: lives of one pool are spread or packed among each other.
        labels: label selectors.
    """

    pool: str
    bundle: Bundle
    labels: Mapping[str, str]
    placement: Literal["spread", "pack"] = "spread"


@dataclass(frozen=True)
class Placed:
    """A life that has its host."""

    node_id: str
    need: Need


def avoiding(need: Need, node_ids: Iterable[str]) -> Need:
    """The same need, anywhere but on these nodes."""
    ids = ",".join(sorted(node_ids))
    return replace(need, labels={**need.labels, NODE_ID: f"!in({ids})"}) if ids else need


def preferred(need: Need, hosts: Iterable[Host], placed: Sequence[Placed]) -> str:
    """The node id of the host with room that spreading or packing asks for; empty if there is none
    with room."""
    of_pool = Counter(life.node_id for life in placed if life.need.pool == need.pool)
    of_all = Counter(life.node_id for life in placed)
    sign = 1 if need.placement == "spread" else -1

    def rank(host: Host) -> tuple[int, int, str]:
        return sign * of_pool[host.node_id], sign * of_all[host.node_id], host.address

    fitting = [
        host for host in hosts if _suits(need, host) and _fits(need.bundle, _left(host, placed))
    ]
    return min(fitting, key=rank).node_id if fitting else ""


def lacking(need: Need, hosts: Sequence[Host]) -> str:
    """Why no host could ever take it, in words; empty if one could, once it is free."""
    suited = [host for host in hosts if _suits(need, host)]
    if not suited:
        if not hosts:
            return "there is no host"
        if not (labels := spoken_labels(need.labels)):
            return "no host is there but those that leave"
        but = ", but for those that leave," if any(map(_avoids, need.labels.items())) else ""
        return f"no host{but} has the labels {labels}"
    if any(_fits(need.bundle, host.resources) for host in suited):
        return ""
    for name, amount in need.bundle.items():
        most = max(suited, key=lambda host: host.resources.get(name, 0.0))
        has = most.resources.get(name, 0.0)
        if has < amount:
            seen = f"the most is {has:g}, on {most.address}" if has else "none has any"
            return f"no host has {amount:g} {name}: {seen}"
    return f"no host has {_spoken(need.bundle)} together"


def spoken_labels(labels: Mapping[str, str]) -> str:
    """The labels that people have set; not what `avoiding` adds."""
    return ", ".join(f"{label[0]}={label[1]}" for label in labels.items() if not _avoids(label))


def _avoids(label: tuple[str, str]) -> bool:
    return label[0] == NODE_ID and label[1].startswith("!in(")


def matches(selector: str, value: str | None) -> bool:
    """Whether a label's value meets Ray's selector: v, !v, in(v, w) or !in(v, w)."""
    wanted = selector.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        among = {part.strip() for part in wanted[3:-1].split(",")}
    else:
        among = {wanted}
    return (value in among) != selector.startswith("!")


def _suits(need: Need, host: Host) -> bool:
    return all(matches(selector, host.labels.get(key)) for key, selector in need.labels.items())


def _fits(bundle: Bundle, room: Bundle) -> bool:
    return all(room.get(name, 0.0) + 1e-6 >= amount for name, amount in bundle.items())


def _left(host: Host, placed: Iterable[Placed]) -> dict[str, float]:
    left = dict(host.resources)
    for life in placed:
        if life.node_id == host.node_id:
            for name, amount in life.need.bundle.items():
                left[name] = left.get(name, 0.0) - amount
    return left


def _spoken(bundle: Bundle) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
