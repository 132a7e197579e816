"""Who is left with a stream when readers come and go, without a store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.clock import SystemClock
from cluster.config_clients import ResumeConfig
from cluster.errors import InvalidRequest
from cluster.ids import RequestId
from cluster.store.streams import StreamHead, StreamName
from router.generation import Generation, Sampling
from router.resume import codec, service
from router.resume.service import Resumption

NAME = StreamName("default", "r")


def generation() -> Generation:
    return Generation(RequestId("r"), "m", (1, 2), Sampling(max_tokens=8), "", 0.0, 1e9)


class Streams:
    """One stream that another router serves and that never says anything."""

    async def head(self, name: StreamName) -> StreamHead:
        return StreamHead(codec.asked(generation(), SystemClock()), "f", "r-9 life", "")

    async def entries(self, *_: Any) -> list[str]:
        return []

    async def take_over(self, *_: Any) -> bool:
        return False


def resumption() -> Resumption:
    config = ResumeConfig(grace_seconds=600)
    return Resumption(config, Streams(), None, "r-0 life", SystemClock())  # type: ignore[arg-type]


async def test_every_reader_that_leaves_leaves_all_of_the_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Recorder:
        def __init__(self, *_: Any) -> None:
            pass

        async def run(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(service, "Recorder", Recorder)
    mine = resumption()
    stream = mine._new(NAME, generation())
    mine._record(NAME, stream, None, saved=0)  # type: ignore[arg-type]
    stream.transcript.reader().leave()
    first = stream.grace
    stream.transcript.reader().leave()
    assert first is not None and first.cancelled()
    assert stream.grace is not None and not stream.grace.cancelled()
    await mine.stop()


async def test_a_bad_resume_follows_nothing() -> None:
    mine = resumption()
    with pytest.raises(InvalidRequest, match="next_offset"):
        await mine.resume("default", "r", [0, 0, 0])
    assert not mine._known
    tasks = list(mine._tasks)
    if tasks:
        await asyncio.wait(tasks, timeout=5)
    assert not mine._tasks
