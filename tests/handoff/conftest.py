from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.handoff import memory_links
from tests.handoff.agents import LARGE, WHERE, Decode, Prefill, random_cache, start_agent
from tests.handoff.raw import RawPeer


def pytest_configure(config: pytest.Config) -> None:
    WHERE.device = config.getoption("--device")
    WHERE.transport = config.getoption("--transport")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if WHERE.device != "cpu" or WHERE.transport != "grpc" else ():
        if item.get_closest_marker("on_host"):
            item.add_marker(pytest.mark.skip(reason="about blocks that leave from host memory"))


@pytest.fixture(autouse=True)
def links_of_memory() -> Iterator[None]:
    """What stands for NCCL on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if WHERE.device == "cpu" and WHERE.transport != "grpc":
            memory_links.install(patch, puts=True)
        yield


@pytest.fixture(params=[1, LARGE], ids=["copied", "in place"])
def times(request: pytest.FixtureRequest) -> int:
    """How much larger blocks are than the smallest: large ones cross without a copy."""
    return int(request.param)


@pytest.fixture
def prefill(times: int) -> Iterator[Prefill]:
    cache = random_cache(1, times)
    side = Prefill(start_agent("prefill", cache, 4096 * times), cache)
    yield side
    side.agent.stop()


@pytest.fixture
def decode(times: int) -> Iterator[Decode]:
    cache = random_cache(2, times, "decode")
    side = Decode(start_agent("decode", cache, 4096 * times), cache)
    yield side
    side.agent.stop()


@pytest.fixture
async def peer(decode: Decode) -> AsyncIterator[RawPeer]:
    raw = RawPeer(decode)
    yield raw
    await raw.close()
