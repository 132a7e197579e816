from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts.namespaces import NamespaceHost, Network, missing_privilege
from tests.hosts.ray_cluster import RayCluster, start_store

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Ground:
    """What the clusters of these tests stand on: a network, Ray's head and a store, a host each."""

    network: Network
    ray: RayCluster
    store: NamespaceHost
    store_url: str


@pytest.fixture(scope="package")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    if why := missing_privilege():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("hosts")
    network = Network()
    ray = None
    try:
        ray = RayCluster(folder, network, own={"head": 100, "room": 1}, spare={"CPU": 1, "room": 1})
        store = network.add()
        yield Ground(network, ray, store, start_store(store, folder))
    finally:
        network.close()
        if ray is not None:
            ray.close()
