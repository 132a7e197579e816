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
        ConfigError: such a file cannot be read, or holds nothing.
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
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[field] = value
    return whole


def read_yaml(path: Path) -> dict[str, Any]:
    """What `path` says. Raises ConfigError if it cannot be read or is not a mapping."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with a `models` list")
    return raw
