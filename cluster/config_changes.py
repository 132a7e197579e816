"""What differs between two configurations, and whether a running cluster can take it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel, SecretStr

from cluster.config import Config

LIVE = (
    "models.*.prefill.replicas",
    "models.*.decode.replicas",
    "router.pool.replicas",
    "router.max_running_requests",
    "router.max_queued_requests",
    "targets.*",
    "classes.*.*",
    "classes.batch_share",
    "classes.interactive_deadline_seconds",
    "tenants",
    "tenants.*.*",
    "tenants.*.limits.*",
    "operator.*",
    "lifecycle.*",
    "planner.*",
    "planner.budget.*.*",
)
"""Fields that a running cluster takes over with `pdserve reload`; `*` is a model or tenant by name,
or a field."""

Flat = dict[str, Any]
"""Values by path, such as `models.llama.prefill.replicas`; JSON; secrets as digests."""


@dataclass(frozen=True)
class Change:
    """A field with two values; None where it is not there at all.

    Attributes:
        why_not: what keeps it from being reloaded live; empty if nothing does.
    """

    path: str
    old: Any
    new: Any
    why_not: str

    @property
    def live(self) -> bool:
        return not self.why_not


def flatten(config: Config) -> Flat:
    """Every field by its path. Models and tenants go by their names, not by their order."""
    flat: Flat = {}
    _walk(config, "", flat)
    return flat


def changes(old: Flat, new: Flat) -> list[Change]:
    """What differs, sorted by path. A model that is new or gone is one change, of its path."""
    found, of_models = [], set()
    for kind, name in (
        *(("new", name) for name in _models(new) - _models(old)),
        *(("gone", name) for name in _models(old) - _models(new)),
    ):
        prefix = f"models.{name}."
        of_models |= {path for path in old.keys() | new.keys() if path.startswith(prefix)}
        where = f"{prefix}path"
        why_not = f"a model that is {kind} needs a restart"
        found.append(Change(prefix[:-1], old.get(where), new.get(where), why_not))
    for path in (old.keys() | new.keys()) - of_models:
        if old.get(path) != new.get(path):
            found.append(Change(path, old.get(path), new.get(path), _why_not(path)))
    return sorted(found, key=lambda change: change.path)


def is_live(path: str) -> bool:
    """A running cluster takes this field over."""
    return any(
        fnmatchcase(path, pattern) and path.count(".") == pattern.count(".") for pattern in LIVE
    ) or any(_named(path, pattern) for pattern in LIVE if pattern.startswith(("models", "tenants")))


def _named(path: str, pattern: str) -> bool:
    """A name may have dots: what counts is the field at the end."""
    head, _, tail = pattern.partition(".*.")
    rest = path.removeprefix(f"{head}.")
    depth = tail.count(".") + 1
    return path.startswith(f"{head}.") and fnmatchcase(".".join(rest.split(".")[-depth:]), tail)


def _why_not(path: str) -> str:
    section = path.partition(".")[0]
    if is_live(path):
        return ""
    if section == "models":
        return "engines are opened with it: restart the cluster"
    if path == "name" or section in ("ray", "store", "secret"):
        return "every process was started with it: restart the cluster"
    return "it is read at the start only: restart the cluster"


def _models(flat: Flat) -> set[str]:
    start, end = "models.", ".path"
    return {p[len(start) : -len(end)] for p in flat if p.startswith(start) and p.endswith(end)}


def _walk(value: Any, path: str, flat: Flat) -> None:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            _walk(getattr(value, name), f"{path}.{name}" if path else name, flat)
    elif isinstance(value, SecretStr):
        digest = hashlib.blake2b(value.get_secret_value().encode(), digest_size=8).hexdigest()
        flat[path] = f"secret {digest}"
    elif isinstance(value, list | tuple) and value and isinstance(value[0], BaseModel):
        for item in value:
            _walk(item, f"{path}.{item.name}", flat)
    elif isinstance(value, Mapping | list | tuple) or value is None:
        flat[path] = value if not isinstance(value, tuple) else list(value)
    else:
        flat[path] = value if isinstance(value, bool | int | float) else str(value)
