"""What the overlays and the configuration promise each other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from cluster.cli.checks import engine_bytes
from cluster.config import Config
from cluster.control.fleet import STOP_GRACE_SECONDS
from cluster.control.leaving import ANSWER_SECONDS
from cluster.ports import candidates
from router.listen import INFERENCE, OPERATOR
from tests.unit.deploy.manifests import (
    GCS_PORT,
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
HTTP_PATHS = {"/healthz", "/readyz"}


@pytest.fixture
def config(overlay: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """As the pod with `pdserve up` reads it."""
    monkeypatch.setenv("PDSERVE_SECRET", "s" * 32)
    monkeypatch.setenv("PDSERVE_STORE__URL", "redis://:x@pdserve-valkey:6379/0")
    file = tmp_path / "cluster.yaml"
    file.write_text(overlay.cluster_yaml)
    return Config.load(file)


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


def test_ports_are_those_of_the_configuration(overlay: Overlay, config: Config) -> None:
    router = overlay.pod("router")
    assert router.ports == {
        "grpc": config.router.grpc_port,
        "http": config.router.http_port,
        "operator": config.router.operator_port,
        "metrics": int(router.ray["metrics-export-port"]),
    }
    assert overlay.workers
    for pod in overlay.workers:
        assert pod.ports == {
            "streams": only(config.worker.ports),
            "metrics": only(config.worker.metrics_ports),
            "transfer": only(config.handoff.ports),
        }
        assert len(pod.listens_on) == len(set(pod.listens_on))
    assert overlay.pod("headgroup").ports["gcs-server"] == GCS_PORT


def only(ports: str) -> int:
    (port,) = candidates(ports)
    return port


def test_no_port_of_ours_is_one_of_rays(overlay: Overlay) -> None:
    for pod in overlay.pods:
        if pod.ray:
            ours = set(pod.ports.values()) - {int(pod.ray["metrics-export-port"])}
            low, high = int(pod.ray["min-worker-port"]), int(pod.ray["max-worker-port"])
            assert not [port for port in ours if low <= port <= high]
            assert 10001 not in range(low, high + 1)  # Ray's client on the head


def test_services_find_pods_and_ports(overlay: Overlay) -> None:
    assert {s["metadata"]["name"] for s in overlay.of_kind("Service")} >= {"pdserve-grpc"}
    for service in overlay.of_kind("Service"):
        pods = matching(overlay, {"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in pods)
            assert all(pod.ports[port["targetPort"]] == port["port"] for pod in pods)


def matching(overlay: Overlay, selector: Document) -> list[PodTemplate]:
    pods = [pod for pod in overlay.pods if pod.matches(selector)]
    assert pods, f"{selector} selects nothing"
    return pods


def test_every_pool_has_its_own_disruption_budget(overlay: Overlay) -> None:
    budgets = overlay.of_kind("PodDisruptionBudget")
    covered = [pod.name for b in budgets for pod in matching(overlay, b["spec"]["selector"])]
    want = {pod.name for pod in overlay.pods} - {"headgroup"}
    assert sorted(covered) == sorted(want)


def test_pods_of_a_group_are_spread(overlay: Overlay) -> None:
    for pod in (overlay.pod("router"), *overlay.workers):
        (constraint,) = pod.spec["topologySpreadConstraints"]
        assert [p.name for p in matching(overlay, constraint["labelSelector"])] == [pod.name]


def test_network_policies_open_what_is_listened_on_and_nothing_else(overlay: Overlay) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in overlay.of_kind("NetworkPolicy")}
    assert policies["pdserve-deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        pods = [pod for pod in overlay.pods if pod.matches(policy["podSelector"])]
        assert pods, name
        for rule in policy.get("ingress", []):
            assert rule["from"], f"{name} opens a port to everyone"
            for peer in rule["from"]:
                if "podSelector" in peer:
                    matching(overlay, peer["podSelector"])
            for port in rule["ports"]:
                listened_on(port, pods, name)


def listened_on(port: Document, pods: list[PodTemplate], policy: str) -> None:
    if isinstance(port["port"], str):
        assert any(port["port"] in pod.ports for pod in pods), (policy, port)
        return
    wanted = set(range(port["port"], port.get("endPort", port["port"]) + 1))
    assert all(wanted <= pod.listens_on for pod in pods), (policy, port)


def opening(overlay: Overlay, port: str) -> tuple[Document, Document]:
    """The one policy and its rule that open a port."""
    found = [
        (policy, rule)
        for policy in overlay.of_kind("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        if {"port": port} in rule["ports"]
    ]
    ((policy, rule),) = found
    return policy, rule


def test_operators_come_from_their_namespace_and_clients_do_not_reach_their_port(
    overlay: Overlay,
) -> None:
    policy, rule = opening(overlay, "operator")
    assert [p.name for p in matching(overlay, policy["spec"]["podSelector"])] == ["router"]
    assert rule["ports"] == [{"port": "operator"}]
    namespace, own = rule["from"]
    assert namespace == {"namespaceSelector": {"matchLabels": {"pdserve/operators": "true"}}}
    assert [p.name for p in matching(overlay, own["podSelector"])] == ["headgroup"]
    guide = (ROOT / "docs" / "deploy.md").read_text()
    assert "pdserve/operators=true" in guide and "pdserve/clients=true" in guide


def test_the_head_is_reached_before_it_is_ready(overlay: Overlay) -> None:
    """It is ready once the workers are, and those join Ray by its Service."""
    service = overlay.ray_cluster["spec"]["headGroupSpec"]["headService"]["spec"]
    assert service["publishNotReadyAddresses"] is True and service["clusterIP"] == "None"


def test_one_ray_is_in_the_images_and_in_the_cluster(overlay: Overlay) -> None:
    version = overlay.ray_cluster["spec"]["rayVersion"]
    for lock in ("cpu.txt", "gpu.txt"):
        assert f"ray=={version}" in (ROOT / "requirements" / lock).read_text().split()


def test_kv_blocks_pass_between_workers_only(overlay: Overlay) -> None:
    policy, rule = opening(overlay, "transfer")
    workers = [pod.name for pod in overlay.workers]
    assert [p.name for p in matching(overlay, policy["spec"]["podSelector"])] == workers
    (peer,) = rule["from"]
    assert [p.name for p in matching(overlay, peer["podSelector"])] == workers


def test_probes_ask_servers_that_are_there(overlay: Overlay) -> None:
    probed = 0
    for pod in overlay.pods:
        for container in pod.containers:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe := container.get(kind):
                    probed += 1
                    check_probe(probe, pod)
    assert probed >= 3 * (1 + len(overlay.workers))
    for pod in (overlay.pod("router"), *overlay.workers):
        assert pod.main["startupProbe"] and pod.main["readinessProbe"] and pod.main["livenessProbe"]


def check_probe(probe: Document, pod: PodTemplate) -> None:
    if grpc := probe.get("grpc"):
        if grpc.get("service", "") == OPERATOR:  # it serves before there are workers
            assert grpc["port"] == pod.ports["operator"]
        else:
            assert grpc["port"] in {pod.ports.get("grpc"), pod.ports.get("streams")}
            assert grpc.get("service", "") in {"", INFERENCE}
    elif http := probe.get("httpGet"):
        assert http["port"] == "http" and http["path"] in HTTP_PATHS
    elif tcp := probe.get("tcpSocket"):
        assert tcp["port"] in pod.listens_on
    else:
        assert probe["exec"]["command"]


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


def test_metrics_are_scraped_where_they_are(overlay: Overlay) -> None:
    (monitor,) = overlay.of_kind("PodMonitor")
    pods = matching(overlay, monitor["spec"]["selector"])
    assert {pod.name for pod in pods} == {"router", *(pod.name for pod in overlay.workers)}
    named = {name for pod in pods for name in pod.ports}
    assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} == {"http", "metrics"}
    assert {"http", "metrics"} <= named
