"""The reference of the configuration, made from its model: docs/configuration.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from cluster.config import Config
from cluster.config_changes import is_live

_UNITS = {
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_len": "tokens",
    "block_size": "tokens",
    "num_blocks": "blocks",
    "replicas": "processes",
    "num_cpus": "CPUs",
    "num_gpus": "GPUs",
    "_parallel_size": "GPUs",
    "_requests": "requests",
    "_jobs": "jobs",
    "_seqs": "sequences",
    "requests_per_second": "requests / s",
    "tokens_per_second": "tokens / s",
    "bytes_per_second": "bytes / s",
    "bytes_per_token": "bytes / token",
    "_streams": "handoffs",
}
_HEAD = """\
<!-- Made by `pdserve config reference > docs/configuration.md`; a test compares. -->
# Configuration

One YAML file, read by `pdserve up -f` and all that takes `-f`. The environment overrides it –
`PDSERVE_ROUTER__GRPC_PORT=6000` sets `router.grpc_port` – and an unknown or impossible field is an
error that names it. [deploy/cluster.yaml](../deploy/cluster.yaml) is a whole one.

**Secrets** – `secret`, `store.url` – are better not in it: set `PDSERVE_SECRET` and
`PDSERVE_STORE__URL`, or name files that hold them in `PDSERVE_SECRET_FILE` and
`PDSERVE_STORE_URL_FILE`. No command ever prints one.

`pdserve config check -f FILE` reads a configuration, `show` prints it with every default, `diff`
tells what changes against the cluster that runs. `pdserve reload -f FILE` makes the fields marked
**live** count at once; a file that changes any other field is refused as a whole, with the reasons.
"""


@dataclass(frozen=True)
class FieldDoc:
    """One field, in words."""

    path: str
    type: str
    unit: str
    default: str
    meaning: str
    live: bool


@dataclass(frozen=True)
class SectionDoc:
    """A section's own words and its fields."""

    path: str
    meaning: str
    fields: tuple[FieldDoc, ...]


def sections(model: type[BaseModel] = Config, path: str = "") -> Iterator[SectionDoc]:
    """The model's sections, outermost first, in the order of the model."""
    fields, inner = [], []
    for name, info in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        section, many = _section(info.annotation)
        if section is None or info.default is None:
            fields.append(_field(where, info))
        if section is not None:
            inner.append((section, f"{where}.*" if many else where))
    said = " ".join((model.__doc__ or "").split())
    yield SectionDoc(path, said, tuple(fields))
    for section, where in inner:
        yield from sections(section, where)


def markdown() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *map(_table, sections())])


def _table(section: SectionDoc) -> str:
    rows = [f"## {section.path.replace('.*', '[]') or 'Top level'}", "", section.meaning, ""]
    if section.fields:
        rows += ["| field | type | unit | default | | meaning |", "|---|---|---|---|---|---|"]
    rows += [
        f"| `{f.path.rpartition('.')[2]}` | {f.type} | {f.unit} | {f.default} |"
        f" {'live' if f.live else ''} | {f.meaning} |"
        for f in section.fields
    ]
    return "\n".join(rows) + "\n"


def _field(path: str, info: FieldInfo) -> FieldDoc:
    kind = _type(info.annotation).replace("|", "\\|")
    meaning = (info.description or "").replace("|", "\\|")
    return FieldDoc(path, kind, _unit(path), _default(info), meaning, is_live(path))


def _unit(path: str) -> str:
    name = path.rpartition(".")[2]
    endings = sorted(_UNITS, key=len, reverse=True)
    return next((_UNITS[ending] for ending in endings if name.endswith(ending)), "")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(arg) for arg in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type(arg) for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {SecretStr: "secret", str: "text", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section behind an annotation, and whether there can be many."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = get_origin(annotation) is list
    for arg in get_args(annotation):
        found, _ = _section(arg)
        if found is not None:
            return found, many
    return None, False
