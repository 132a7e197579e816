"""Where a configuration comes from: a YAML file, or the cluster that ships."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError

MIB = 1 << 20


def default_cluster() -> dict[str, Any]:
    """The cluster of `pdserve up` without a file: the shipped model, one worker a role."""
    root = os.environ.get("PDSERVE_EXAMPLES")
    examples = Path(root) if root else Path(__file__).resolve().parent.parent / "examples"
    return {
        # One worker would always be faster with so small a model; it is there for the handoff.
        "placement": {"disaggregate": "always"},
        "models": [
            {
                "name": "recall-tiny",
                "path": str(examples / "recall-tiny"),
                "dtype": "float32",
                "max_num_batched_tokens": 512,
                "kv_cache_bytes": 256 * MIB,
                "enforce_eager": True,
            }
        ],
    }


SECRET_FILES = {
    "PDSERVE_SECRET_FILE": ("secret",),
    "PDSERVE_STORE_URL_FILE": ("store", "url"),
}
"""Environment variables that name files, and the fields whose values those hold."""


def with_secret_files(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the secrets that the environment says are in files.

    Raises:
        ConfigError: such a file cannot be read, or holds nothing; or its section in `raw` is none.
    """
    whole = dict(raw)
    for variable, (*sections, field) in SECRET_FILES.items():
        if not (path := os.environ.get(variable)):
            continue
        try:
            value = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"{variable}: {path} cannot be read: {why}") from None
        if not value:
            raise ConfigError(f"{variable}: {path} is empty; it must hold the secret")
        inner = whole
        for section in sections:
            if not isinstance(inner.get(section) or {}, dict):
                raise ConfigError(f"{section}: must be a section, as {variable} sets a field of it")
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[field] = value
    return whole


def read_yaml(path: Path) -> dict[str, Any]:
    """What `path` says. Raises ConfigError if it cannot be read, is not a mapping or names a key
    twice; the error never repeats a line of the file, which may hold a secret."""
    try:
        raw = yaml.load(path.read_text(), _EachKeyOnce)  # noqa: S506 - it is a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: is not YAML: {error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with a `models` list")
    return raw


class _EachKeyOnce(yaml.SafeLoader):
    """YAML itself would take the last of two equal keys and drop the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
