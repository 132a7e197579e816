from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.cluster.running import RunningCluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package")  # its engines would take time from what follows
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One prefill and one decode worker with real engines, shared by every test."""
    running = RunningCluster(tmp_path_factory.mktemp("cluster"), "tests")
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        code, left = running.stop()
        assert (code, left) == (0, [])


@pytest.fixture
def channel(cluster: RunningCluster) -> Iterator[grpc.Channel]:
    with cluster.channel() as open_channel:
        yield open_channel
