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
