"""Every manifest against the schemas of Kubernetes and KubeRay, unknown fields refused."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.unit.deploy.manifests import ROOT, Overlay

KUBERNETES = ("1.29", "1.37")
"""The oldest that docs/deploy.md names, and the newest whose schemas are there."""

CUSTOM = {"RayCluster", "PodMonitor"}
RAYCLUSTER_SCHEMA = Path(
    os.environ.get("PDSERVE_RAYCLUSTER_SCHEMA")
    or ROOT.parent / "shared" / "schemas" / "raycluster-v1.schema.json"
)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_object(overlay: Overlay, version: str) -> None:
    for document in overlay.documents:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_pod_that_kuberay_will_make(overlay: Overlay, version: str) -> None:
    for pod in overlay.pods:
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod.spec}
        kubernetes_validate.validate(made, version, strict=True)


def test_kuberay_takes_the_ray_cluster(overlay: Overlay) -> None:
    if not RAYCLUSTER_SCHEMA.is_file():
        pytest.skip(
            f"{RAYCLUSTER_SCHEMA} is not there: name KubeRay's schema of RayCluster v1 in"
            " PDSERVE_RAYCLUSTER_SCHEMA"
        )
    _ray_cluster().validate(overlay.ray_cluster)


@cache
def _ray_cluster() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(json.loads(RAYCLUSTER_SCHEMA.read_text())))


def test_the_closed_schema_refuses_what_kubernetes_would_drop() -> None:
    schema = _closed({"type": "object", "properties": {"a": {"type": "string"}}})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"b": 1}, schema)


def _closed(schema: Any) -> Any:
    """The same schema, but an unknown field is an error: Kubernetes drops it in silence."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if schema.get("type") == "object" and isinstance(properties, dict):
        is_root = {"apiVersion", "kind", "metadata"} <= properties.keys()
        if not is_root and not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed
