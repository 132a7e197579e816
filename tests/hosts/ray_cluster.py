"""A Ray cluster in token-auth mode over several hosts, as `ray start` makes it, and a store.

Its autoscaler (v2) runs with Ray's fake provider: the nodes it adds are raylets on the head's host.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import redis

from cluster.store.embedded import server_binary
from tests.hosts.namespaces import NamespaceHost, Network

RAY = Path(sys.executable).parent / "ray"
PORT = 6379
OBJECT_STORE = 80 << 20
HEAD_NODE_ID = f"{'f' * 51}00000"
"""As the fake provider calls it."""
START_SECONDS = 90.0
Resources = dict[str, float]
FAKE_HEAD = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
}

NOT_OURS = (
    "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
    "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
"""What Ray's autoscaler wants to find in its configuration, and does nothing with here."""


class RayCluster:
    """The first host is the head. It claims a GPU that it does not have.

    Args:
        own: resources of the head.
        spare: resources of the node, one at most, that the autoscaler adds when something waits
            for them.

    Attributes:
        temp: Ray's directory, of which every host sees its own.
        env: what its processes and its clients need, the token's place among it.
    """

    def __init__(self, folder: Path, network: Network, own: Resources, spare: Resources) -> None:
        self.folder = folder
        self.network = network
        self.temp = Path("/tmp", f"pdh{os.getpid()}")  # Ray's sockets want a short path
        token = folder / "ray_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PDSERVE_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "12",
        }
        self.head = network.add()
        self.address = f"{self.head.address}:{PORT}"
        scaling = folder / "autoscaling.json"
        scaling.write_text(json.dumps(_autoscaling(self.address, spare)))
        self._start(
            self.head, "--head", f"--port={PORT}", "--include-dashboard=false",
            f"--temp-dir={self.temp}", f"--autoscaling-config={scaling}", "--num-gpus=1",
            f"--resources={json.dumps(own)}", env=FAKE_HEAD,
        )  # fmt: skip
        self._wait_for_port()

    def join(self, host: NamespaceHost, labels: str = "", **resources: float) -> None:
        """Starts a raylet on `host`, with a directory for Ray that no other host sees; returns at
        once.

        Args:
            labels: of the host, as name=value.
        """
        self._start(
            host, f"--address={self.address}", f"--resources={json.dumps(resources)}",
            f"--labels={labels}",
            first=("sh", "-c", f'mount -t tmpfs ray {self.temp} && exec "$@"', "sh"),
        )  # fmt: skip

    def run(self, *command: str | Path) -> str:
        """What a command says on the head's host."""
        done = subprocess.run(
            [*self.head.within, *command], env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """Removes what `Network.close` leaves."""
        shutil.rmtree(self.temp, ignore_errors=True)

    def _start(
        self,
        host: NamespaceHost,
        *options: str,
        first: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        host.spawn(
            *first, RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=1",
            f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE}", *options,
            env=self.env | (env or {}), log=self.folder / f"ray-{host.name}.log",
        )  # fmt: skip

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not any(at.endswith(f":{PORT}") for at in self.head.listening()):
            assert time.monotonic() < deadline, "Ray's head does not start"
            time.sleep(0.2)


def _autoscaling(gcs_address: str, spare: Resources) -> dict[str, object]:
    """What Ray's autoscaler reads. Its wheel lacks the defaults of the fake provider's own type."""
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "spare": {"resources": spare | {"object_store_memory": OBJECT_STORE}, "node_config": {},
                  "min_workers": 0, "max_workers": 1},
    }  # fmt: skip
    provider = {"type": "external", "module": module, "launch_multiple": True,
                "head_node_id": HEAD_NODE_ID, "gcs_address": gcs_address,
                "disable_node_updaters": True, "disable_launch_config_check": True}  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": 1,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        **dict.fromkeys(NOT_OURS, ()),
        "available_node_types": kinds,
    }


def start_store(host: NamespaceHost, folder: Path) -> str:
    """A Valkey on `host`'s first interface, under a password; its URL."""
    password = secrets.token_hex(16)
    host.spawn(
        server_binary(), "--bind", host.address, "--port", "6379", "--requirepass", password,
        "--save", "", "--dir", str(folder), env=dict(os.environ), log=folder / "store.log",
    )  # fmt: skip
    url = f"redis://:{password}@{host.address}:6379/0"
    deadline = time.monotonic() + 10
    while True:
        try:
            redis.Redis.from_url(url).ping()
            return url
        except redis.ConnectionError:
            assert time.monotonic() < deadline, (folder / "store.log").read_text()
            time.sleep(0.05)


def token_less(cluster: RayCluster, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command on the head's host without the cluster's token."""
    env = {k: v for k, v in cluster.env.items() if not k.startswith("RAY_AUTH")}
    return subprocess.run(
        [*cluster.head.within, *command], env=env, capture_output=True, text=True, timeout=120
    )
