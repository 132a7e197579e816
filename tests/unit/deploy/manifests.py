"""The overlays as `kubectl kustomize` renders them, and what KubeRay will make of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
OVERLAYS = ROOT / "deploy" / "kustomize" / "overlays"
NAMES = sorted(path.name for path in OVERLAYS.iterdir())

Document = dict[str, Any]

GCS_PORT = 6379
"""Of Ray's control store; KubeRay's default."""

RAY_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


@dataclass(frozen=True)
class PodTemplate:
    """A pod as it will be, with the labels that KubeRay adds.

    Attributes:
        ray: its rayStartParams; empty if it is none of Ray's.
        replicas, max_replicas: of its group.
    """

    name: str
    labels: dict[str, str]
    spec: Document
    ray: dict[str, str]
    replicas: int = 1
    max_replicas: int = 1

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Document:
        """Ray's own container, or the only one."""
        container: Document = self.spec["containers"][0]
        return container

    @property
    def ports(self) -> dict[str, int]:
        """By name."""
        return {p["name"]: p["containerPort"] for c in self.containers for p in c.get("ports", [])}

    @property
    def listens_on(self) -> set[int]:
        """Every port that something in it listens on."""
        ports = set(self.ports.values()) | {int(self.ray[p]) for p in RAY_PORTS if p in self.ray}
        if self.ray:
            low, high = (int(self.ray[f"{end}-worker-port"]) for end in ("min", "max"))
            ports |= set(range(low, high + 1))
        return ports

    def matches(self, selector: Document) -> bool:
        """A Kubernetes label selector."""
        exact = all(self.labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
        return exact and all(
            self.labels.get(e["key"]) in e["values"]
            for e in selector.get("matchExpressions", [])
            if e["operator"] == "In"
        )


@dataclass(frozen=True)
class Overlay:
    """All documents of an overlay."""

    name: str
    documents: tuple[Document, ...]

    def of_kind(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    @property
    def ray_cluster(self) -> Document:
        (cluster,) = self.of_kind("RayCluster")
        return cluster

    @property
    def cluster_yaml(self) -> str:
        (config,) = [
            m for m in self.of_kind("ConfigMap") if m["metadata"]["name"] == "pdserve-config"
        ]
        text: str = config["data"]["cluster.yaml"]
        return text

    @property
    def pods(self) -> list[PodTemplate]:
        return list(self._pods())

    def _pods(self) -> Iterator[PodTemplate]:
        cluster, spec = self.ray_cluster["metadata"]["name"], self.ray_cluster["spec"]
        groups = [{"groupName": "headgroup", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]
        for group in groups:
            labels = {
                **group["template"].get("metadata", {}).get("labels", {}),
                "ray.io/cluster": cluster,
                "ray.io/group": group["groupName"],
                "ray.io/node-type": "head" if group is groups[0] else "worker",
            }
            yield PodTemplate(
                group["groupName"], labels, group["template"]["spec"], group["rayStartParams"],
                group.get("replicas", 1), group.get("maxReplicas", 1),
            )  # fmt: skip
        for kind in ("StatefulSet", "Deployment"):
            for owner in self.of_kind(kind):
                template = owner["spec"]["template"]
                labels = template["metadata"]["labels"]
                yield PodTemplate(owner["metadata"]["name"], labels, template["spec"], {})

    def pod(self, name: str) -> PodTemplate:
        return next(pod for pod in self.pods if pod.name == name)

    def matching(self, selector: Document) -> list[PodTemplate]:
        """The pods that a label selector finds; asserts that there are some."""
        pods = [pod for pod in self.pods if pod.matches(selector)]
        assert pods, f"{selector} selects nothing"
        return pods

    @property
    def workers(self) -> list[PodTemplate]:
        """The groups whose pods carry workers."""
        return [pod for pod in self.pods if "streams" in pod.ports]


def missing_kubectl() -> str:
    """Why overlays cannot be rendered here; empty if they can."""
    return "" if shutil.which("kubectl") else "rendering the overlays needs kubectl"


@cache
def render(name: str) -> Overlay:
    done = subprocess.run(
        ["kubectl", "kustomize", str(OVERLAYS / name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return Overlay(name, tuple(yaml.safe_load_all(done.stdout)))


def quantity(text: str) -> float:
    """A Kubernetes quantity: cores, bytes or a count."""
    units = {"m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
    for suffix, factor in units.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
