"""Who is left with a stream when readers come and go, without a store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.clock import SystemClock
from cluster.config_clients import ResumeConfig
from cluster.errors import InvalidRequest, NotResumable, Unavailable
from cluster.ids import RequestId
from cluster.store.streams import StreamHead, StreamName
from router.generation import Generation, Sampling
from router.resume import codec, service
from router.resume.service import Resumption

NAME = StreamName("default", "r")


def generation() -> Generation:
    return Generation(RequestId("r"), "m", (1, 2), Sampling(max_tokens=8), "", 0.0, 1e9)


class Streams:
    """One stream that another router serves and that never says anything; what is done to it."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()
        self.taken = self.out = False
        self.left: list[str] = []

    async def head(self, name: StreamName) -> StreamHead:
        return StreamHead(codec.asked(generation(), SystemClock()), "f", "r-9 life", "")

    async def entries(self, *_: Any) -> list[str]:
        if self.out:
            self.out = False
            raise Unavailable("the store does not answer")
        return []

    async def take_over(self, *_: Any) -> bool:
        self.asked.set()
        await self.answer.wait()
        self.out = self.taken
        return self.taken

    async def abandon(self, *_: Any) -> None:
        self.left.append("abandoned")

    async def finish(self, *_: Any) -> None:
        self.left.append("finished")


class Dispatch:
    def submit(self, *_: Any) -> None:
        raise NotResumable("it could not go on exactly")


def resumption(streams: Streams | None = None) -> Resumption:
    config = ResumeConfig(grace_seconds=600)
    streams = streams or Streams()
    return Resumption(config, streams, Dispatch(), "r-0 life", SystemClock())  # type: ignore[arg-type]


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
        await asyncio.wait(tasks, timeout=30)
    assert not mine._tasks


@pytest.mark.parametrize(
    ("taken", "stays", "left"),
    [(True, False, ["abandoned"]), (False, False, []), (True, True, ["finished"])],
)
async def test_a_stream_that_is_taken_over_is_served_or_left_to_the_others(
    taken: bool, stays: bool, left: list[str]
) -> None:
    streams = Streams()
    mine = resumption(streams)
    reader = await mine.resume("default", "r", [])
    await streams.asked.wait()
    if not stays:
        reader.leave()  # while the store makes it this router's
    streams.taken = taken
    streams.answer.set()
    async with asyncio.timeout(30):
        while mine._tasks:
            await asyncio.wait(list(mine._tasks))
    assert streams.left == left
    reader.leave()
    assert not mine._known
