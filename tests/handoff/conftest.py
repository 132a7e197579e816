from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.handoff.agents import Decode, Prefill, random_cache, start_agent
from tests.handoff.raw import RawPeer


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    cache = random_cache(1)
    side = Prefill(start_agent("prefill", cache), cache)
    yield side
    side.agent.stop()


@pytest.fixture
def decode() -> Iterator[Decode]:
    cache = random_cache(2)
    side = Decode(start_agent("decode", cache), cache)
    yield side
    side.agent.stop()


@pytest.fixture
async def peer(decode: Decode) -> AsyncIterator[RawPeer]:
    raw = RawPeer(decode)
    yield raw
    await raw.close()
