"""Who reaches what: ports, Services, NetworkPolicies, probes, metrics."""

from __future__ import annotations

from cluster.config import Config
from cluster.ports import candidates
from router.listen import INFERENCE, OPERATOR
from tests.unit.deploy.manifests import GCS_PORT, ROOT, Document, Overlay, PodTemplate

HTTP_PATHS = {"/healthz", "/readyz"}


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
        pods = overlay.matching({"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in pods)
            assert all(pod.ports[port["targetPort"]] == port["port"] for pod in pods)


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
                    overlay.matching(peer["podSelector"])
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
    assert [p.name for p in overlay.matching(policy["spec"]["podSelector"])] == ["router"]
    assert rule["ports"] == [{"port": "operator"}]
    namespace, own = rule["from"]
    assert namespace == {"namespaceSelector": {"matchLabels": {"pdserve/operators": "true"}}}
    assert [p.name for p in overlay.matching(own["podSelector"])] == ["headgroup"]
    guide = (ROOT / "docs" / "deploy.md").read_text()
    assert "pdserve/operators=true" in guide and "pdserve/clients=true" in guide


def test_kv_blocks_pass_between_workers_only(overlay: Overlay) -> None:
    policy, rule = opening(overlay, "transfer")
    workers = [pod.name for pod in overlay.workers]
    assert [p.name for p in overlay.matching(policy["spec"]["podSelector"])] == workers
    (peer,) = rule["from"]
    assert [p.name for p in overlay.matching(peer["podSelector"])] == workers


def test_the_head_is_reached_before_it_is_ready(overlay: Overlay) -> None:
    """It is ready once the workers are, and those join Ray by its Service."""
    service = overlay.ray_cluster["spec"]["headGroupSpec"]["headService"]["spec"]
    assert service["publishNotReadyAddresses"] is True and service["clusterIP"] == "None"


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


def test_metrics_are_scraped_where_they_are(overlay: Overlay) -> None:
    (monitor,) = overlay.of_kind("PodMonitor")
    pods = overlay.matching(monitor["spec"]["selector"])
    assert {pod.name for pod in pods} == {"router", *(pod.name for pod in overlay.workers)}
    named = {name for pod in pods for name in pod.ports}
    assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} == {"http", "metrics"}
    assert {"http", "metrics"} <= named
