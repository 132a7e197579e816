"""What the overlays and the configuration promise each other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

from cluster.cli.checks import engine_bytes
from cluster.config import Config
from cluster.control.fleet import STOP_GRACE_SECONDS
from cluster.control.leaving import ANSWER_SECONDS
from tests.unit.deploy.manifests import (
    ROOT,
    Document,
    Overlay,
    PodTemplate,
    quantity,
)

SECRETS = {
    "pdserve-secrets": {"secret", "store-url", "store-password"},
    "pdserve-ray-token": {"auth_token"},
}


def test_the_configuration_is_one_and_holds_no_secret(overlay: Overlay, config: Config) -> None:
    assert config.ray.address is not None
    assert "secret:" not in overlay.cluster_yaml and "url:" not in overlay.cluster_yaml
    assert not overlay.of_kind("Secret")


def test_secrets_are_those_that_the_guide_makes(overlay: Overlay) -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    text = json.dumps(overlay.documents)
    used = set(re.findall(r'"secretKeyRef": \{"key": "([^"]+)", "name": "([^"]+)"\}', text))
    assert used == {(key, name) for name, keys in SECRETS.items() for key in keys}
    for name, keys in SECRETS.items():
        assert f"secret generic {name}" in guide
        assert all(f"--from-file={key}=" in guide for key in keys)


def test_every_pool_has_its_own_disruption_budget(overlay: Overlay) -> None:
    budgets = overlay.of_kind("PodDisruptionBudget")
    covered = [pod.name for b in budgets for pod in overlay.matching(b["spec"]["selector"])]
    want = {pod.name for pod in overlay.pods} - {"headgroup"}
    assert sorted(covered) == sorted(want)


def test_pods_of_a_group_are_spread(overlay: Overlay) -> None:
    for pod in (overlay.pod("router"), *overlay.workers):
        (constraint,) = pod.spec["topologySpreadConstraints"]
        assert [p.name for p in overlay.matching(constraint["labelSelector"])] == [pod.name]


def test_one_ray_is_in_the_images_and_in_the_cluster(overlay: Overlay) -> None:
    version = overlay.ray_cluster["spec"]["rayVersion"]
    for lock in ("cpu.txt", "gpu.txt"):
        assert f"ray=={version}" in (ROOT / "requirements" / lock).read_text().split()


def test_a_pod_that_goes_has_the_time_to_drain(overlay: Overlay, config: Config) -> None:
    longest = config.router.default_timeout_seconds
    assert config.lifecycle.drain_timeout_seconds >= longest
    bound = config.lifecycle.drain_timeout_seconds + STOP_GRACE_SECONDS + ANSWER_SECONDS
    for pod in (overlay.pod("router"), *overlay.workers):
        assert pod.spec["terminationGracePeriodSeconds"] >= bound
        command = pod.main["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["pdserve", "drain-host", "-f"]
        folder = str(Path(command[3]).parent)
        assert folder in {mount["mountPath"] for mount in pod.main["volumeMounts"]}


def test_pools_fit_into_their_pods(overlay: Overlay, config: Config) -> None:
    demand: dict[str, int] = {}
    for model in config.models:
        for pool in (model.prefill, model.decode):
            ((resource, amount),) = pool.resources.items()
            (pod,) = [pod for pod in overlay.workers if resource in resources(pod)]
            requests = pod.main["resources"]["requests"]
            limits = pod.main["resources"]["limits"]
            assert resources(pod)[resource] == amount == 1  # one worker a pod
            assert pool.num_cpus <= int(pod.ray["num-cpus"]) <= quantity(requests["cpu"])
            gpus = int(requests.get("nvidia.com/gpu", 0))
            assert gpus == int(limits.get("nvidia.com/gpu", 0)) == int(pod.ray.get("num-gpus", 0))
            assert (pool.num_gpus or 0) == gpus
            if not gpus:
                shm = quantity(volume(pod, "shm")["emptyDir"]["sizeLimit"])
                assert engine_bytes(model) + shm <= quantity(requests["memory"])
            demand[pod.name] = demand.get(pod.name, 0) + pool.replicas
    for name, replicas in demand.items():
        assert replicas <= overlay.pod(name).max_replicas
    router = overlay.pod("router")
    assert config.router.pool.resources == resources(router)
    assert config.router.pool.replicas <= router.max_replicas


def test_the_guide_says_what_the_pods_ask_for(overlay: Overlay) -> None:
    asked = dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), 0.0)
    scaler = overlay.ray_cluster["spec"]["autoscalerOptions"]["resources"]["requests"]
    requests = [(1, scaler)] + [
        (pod.replicas, container["resources"]["requests"])
        for pod in overlay.pods for container in pod.containers
    ]  # fmt: skip
    for replicas, each in requests:
        for name, amount in each.items():
            asked[name] += replicas * quantity(amount)
    said = f"{asked['cpu']:g} CPU, {asked['memory'] / 2**30:g} GiB"
    if gpus := asked["nvidia.com/gpu"]:
        said += f", {gpus:g} GPU"
    guide = (ROOT / "docs" / "deploy.md").read_text()
    (row,) = re.findall(rf"^\| `{overlay.name}` \|.*", guide, re.M)
    assert f"| {said} |" in row


def resources(pod: PodTemplate) -> dict[str, float]:
    """KubeRay wants JSON within quotes."""
    found: dict[str, float] = json.loads(json.loads(pod.ray["resources"].replace("'", "")))
    return found


def volume(pod: PodTemplate, name: str) -> Document:
    found: Document = next(v for v in pod.spec["volumes"] if v["name"] == name)
    return found


def test_weights_are_on_a_claim_or_in_the_image(overlay: Overlay, config: Config) -> None:
    """Whoever reads a model has it, and no claim is made that a small cluster could not bind."""
    claims = {claim["metadata"]["name"] for claim in overlay.of_kind("PersistentVolumeClaim")}
    for pod in (overlay.pod("router"), *overlay.workers):
        mounted = {
            mount["mountPath"]: source["persistentVolumeClaim"]["claimName"]
            for source in pod.spec["volumes"] if "persistentVolumeClaim" in source
            for mount in pod.main["volumeMounts"] if mount["name"] == source["name"]
        }  # fmt: skip
        assert set(mounted.values()) == claims
        for model in config.models:
            image = model.path.startswith("/opt/pdserve/")
            assert image or any(Path(model.path).is_relative_to(at) for at in mounted)


def test_rays_memory_fits(overlay: Overlay) -> None:
    for pod in overlay.pods:
        if pod.ray:
            shm = quantity(volume(pod, "shm")["emptyDir"]["sizeLimit"])
            assert int(pod.ray["object-store-memory"]) <= shm
            assert shm < quantity(pod.main["resources"]["limits"]["memory"])


def test_ray_knows_every_start_parameter(overlay: Overlay) -> None:
    ray = importlib.util.find_spec("ray")  # not imported: that takes seconds
    assert ray is not None and ray.origin is not None
    source = (Path(ray.origin).parent / "scripts" / "scripts.py").read_text()
    known = set(re.findall(r'"--([a-z0-9-]+)"', source))
    assert "node-ip-address" in known
    for pod in overlay.pods:
        assert not pod.ray.keys() - known


def test_ray_asks_for_a_token_and_shows_no_dashboard(overlay: Overlay) -> None:
    spec = overlay.ray_cluster["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"]
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")


def test_nothing_else_owns_the_numbers(overlay: Overlay) -> None:
    assert not overlay.of_kind("HorizontalPodAutoscaler")
    assert not overlay.of_kind("ScaledObject")


def test_valkey_is_its_pods_first_process_and_gets_its_settings(
    overlay: Overlay, tmp_path: Path
) -> None:
    """Where a shell stays in front of it, the signal that ends the pod never reaches it."""
    server = tmp_path / "valkey-server"
    server.write_text('#!/bin/sh\necho "pid $$"; echo "args $*"; exec cat\n')
    server.chmod(0o755)
    container = overlay.pod("pdserve-valkey").main
    process = subprocess.Popen(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDISCLI_AUTH": "a-password"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = process.communicate(timeout=20)[0].splitlines()
    assert said[0] == f"pid {process.pid}"
    assert "a-password" not in said[1] and "noeviction" in said[1]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert said[2:] == [
        "requirepass a-password", "appendonly yes", "appendfsync everysec", f"dir {mounts[0]}"
    ]  # fmt: skip


def test_the_planner_knows_what_it_plans_with(overlay: Overlay, config: Config) -> None:
    """Where Ray names several kinds of GPU, the configuration says which one is planned with."""
    kinds = {
        re.split(r"[^A-Z0-9]", gpu.upper())[1]
        for pod in overlay.workers
        if (gpu := pod.spec.get("nodeSelector", {}).get("nvidia.com/gpu.product"))
    }
    assert len(kinds) < 2 or config.planner.hardware in kinds


def test_no_pod_can_do_more_than_it_must(overlay: Overlay) -> None:
    for pod in overlay.pods:
        whole = pod.spec["securityContext"]
        assert whole["runAsNonRoot"] is True and whole["runAsUser"] > 0
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.spec.get("hostNetwork") and not pod.spec.get("hostPID")
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert re.fullmatch(r".+:[\w.-]*\d[\w.-]*", container["image"]), (
                "an image without version"
            )


def test_what_is_written_is_written_to_volumes(overlay: Overlay) -> None:
    for pod in overlay.pods:
        if not pod.ray:
            continue
        for container in pod.containers:
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {"/tmp", "/dev/shm"} <= writable
            env = {e["name"]: e.get("value") for e in container["env"]}
            for name in ("HOME", "PDSERVE_RUNTIME_DIR"):
                if path := env.get(name):
                    assert any(Path(path).is_relative_to(mount) for mount in writable), path
