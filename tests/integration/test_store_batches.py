"""Batch jobs in the store: leases, results once, cancelling, and a restart of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from cluster.errors import Overloaded, Unavailable
from cluster.store.batch_records import BatchJob
from cluster.store.batches import PAGE_LINES, Batches
from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.files import FileRecord, Files

TOTAL = 2 * PAGE_LINES + 3
JOB = BatchJob("b-1", "t", "/v1/completions", "in_progress", TOTAL, 100.0, 1000.0)
LINES = [f"line {i}" for i in range(TOTAL)]
NOW, UNTIL = 200.0, 215.0
STORED = "pdserve:{c}:batch-bytes"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore.start(tmp_path)
    yield store
    store.stop()


@pytest.fixture
async def client(store: EmbeddedStore) -> AsyncIterator[Redis]:
    client = await connect(store.url, 30.0)
    yield client
    await client.aclose()


@pytest.fixture
def batches(client: Redis) -> Batches:
    return Batches(client, "c", 10_000)


async def serve(batches: Batches, job: BatchJob, owner: str, now: float = NOW) -> set[int]:
    """One page to its end; the lines that it had."""
    page = await batches.claim(job, owner, now, now + 15)
    assert page is not None
    for line in page.lines:
        assert await batches.write_result(job, line, f"result {line}", failed=False)
    await batches.settle(job, owner, page.number, now)
    return set(page.lines)


async def test_a_job_from_its_lines_to_its_results(batches: Batches, client: Redis) -> None:
    job = await batches.add(JOB, LINES, [(1, "bad")])
    assert (job.failed, job.completed, job.state) == (1, 0, "in_progress")
    assert await batches.active() == [job]
    assert await batches.lines(job, 2) == LINES[2 * PAGE_LINES :]
    done = set()
    for owner in ("r-0", "r-1", "r-0"):
        done |= await serve(batches, job, owner)
    assert done == set(range(TOTAL)) - {1}
    ended = await batches.get("t", "b-1")
    assert ended is not None
    assert (ended.state, ended.completed, ended.failed) == ("completed", TOTAL - 1, 1)
    assert ended.ended_at == NOW
    assert await batches.active() == []
    assert await batches.results(job, failed=True, start=0, count=9) == ["bad"]
    results = await batches.results(job, failed=False, start=0, count=100)
    assert sorted(results) == sorted(f"result {line}" for line in done)
    assert not await batches.write_result(job, 3, "again", failed=False)
    assert [j.batch_id for j in await batches.ended_before(NOW + 1)] == ["b-1"]
    await batches.drop(ended)
    assert await batches.get("t", "b-1") is None
    assert await batches.latest("t", 10) == []
    await batches.drop(ended)  # as another router does that has seen it end as well
    assert await client.get(STORED) == "0"
    await client.zadd("pdserve:{c}:batches-ended", {"t/b-1": NOW})
    await batches.drop(ended)  # as the next sweep does where the first one broke off
    assert await client.zcard("pdserve:{c}:batches-ended") == 0


async def test_a_page_is_one_routers_until_its_lease_runs_out(batches: Batches) -> None:
    job = await batches.add(JOB, LINES, [])
    pages = [await batches.claim(job, f"r-{i}", NOW, UNTIL) for i in range(4)]
    assert {page.number for page in pages if page} == {0, 1, 2}
    assert pages[3] is None
    assert await batches.renew(job, "r-0", UNTIL + 10, [0]) == {0}
    assert await batches.renew(job, "r-1", UNTIL + 10, [0]) == set()
    assert await batches.write_result(job, PAGE_LINES, "result", failed=False)
    again = await batches.claim(job, "r-3", UNTIL, UNTIL + 15)
    assert again is not None
    assert again.lines == tuple(range(PAGE_LINES + 1, 2 * PAGE_LINES))
    assert await batches.renew(job, "r-1", UNTIL + 10, [1]) == set()
    # The first owner wakes up: its result comes first, and there is no second one.
    assert await batches.write_result(job, PAGE_LINES + 1, "late", failed=False)
    assert not await batches.write_result(job, PAGE_LINES + 1, "second", failed=False)
    await batches.settle(job, "r-1", 1, UNTIL)
    assert await batches.claim(job, "r-4", UNTIL, UNTIL + 15) is not None  # page 2
    assert await batches.claim(job, "r-4", UNTIL, UNTIL + 15) is None


async def test_racing_claims_and_results(batches: Batches) -> None:
    job = await batches.add(JOB, LINES, [])
    claims = await asyncio.gather(*(batches.claim(job, f"r-{i}", NOW, UNTIL) for i in range(20)))
    assert sorted(page.number for page in claims if page) == [0, 1, 2]
    written = await asyncio.gather(
        *(batches.write_result(job, 0, f"from {i}", failed=False) for i in range(20))
    )
    assert written.count(True) == 1
    assert len(await batches.results(job, failed=False, start=0, count=9)) == 1


async def test_cancelled(batches: Batches) -> None:
    job = await batches.add(JOB, LINES, [])
    page = await batches.claim(job, "r-0", NOW, UNTIL)
    assert page is not None
    assert await batches.cancel(job)
    assert not await batches.cancel(job)
    assert await batches.claim(job, "r-1", NOW, UNTIL) is None
    assert not await batches.settle(job, "r-1", -1, NOW)  # r-0 still works
    assert await batches.write_result(job, 0, "in time", failed=False)
    assert await batches.settle(job, "r-0", page.number, NOW, done=False)
    ended = await batches.get("t", "b-1")
    assert ended is not None and (ended.state, ended.completed) == ("cancelled", 1)


async def test_a_dead_routers_lease_does_not_keep_a_cancelled_job(batches: Batches) -> None:
    job = await batches.add(JOB, LINES, [])
    await batches.claim(job, "r-0", NOW, UNTIL)
    await batches.cancel(job, "expired")
    assert not await batches.settle(job, "r-1", -1, NOW)
    assert await batches.settle(job, "r-1", -1, UNTIL)
    ended = await batches.get("t", "b-1")
    assert ended is not None and ended.state == "expired"


async def test_no_more_than_the_store_may_hold(batches: Batches) -> None:
    await batches.add(JOB, LINES, [])
    with pytest.raises(Overloaded, match="max_stored_bytes"):
        await batches.add(replace(JOB, batch_id="b-2"), ["x" * 10_000], [])
    assert [job.batch_id for job in await batches.latest("t", 10)] == ["b-1"]


@contextlib.asynccontextmanager
async def forgetful(url: str, answers: int) -> AsyncIterator[Redis]:
    """A client whose way to the store breaks after so many answers to large writes have been lost:
    the store did what it was asked to."""
    port = int(urlsplit(url).port or 0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answers
        inner, outer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            while asked := await reader.read(1 << 20):
                outer.write(asked)
                answer = await inner.read(1 << 20)
                if b"line 0" in asked and answers and not answer.startswith(b"-NOSCRIPT"):
                    answers -= 1
                    break
                writer.write(answer)
        outer.close()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        here = server.sockets[0].getsockname()[1]
        client = await connect(url.replace(f":{port}/", f":{here}/"), 1.0)
        yield client
        await client.aclose()
    assert not answers


async def test_what_is_written_again_is_there_once(store: EmbeddedStore) -> None:
    async with forgetful(store.url, 1) as client:
        files = Files(client, "c", 10_000)
        await files.add("t", FileRecord("f", "line 0", "batch", 7, 5.0), LINES)
        assert await files.lines("t", "f") == LINES
    async with forgetful(store.url, 1) as client:
        batches = Batches(client, "c", 10_000)
        job = await batches.add(JOB, LINES, [(1, "bad")])
        assert [await batches.lines(job, page) for page in range(3)] == [
            LINES[start : start + PAGE_LINES] for start in range(0, TOTAL, PAGE_LINES)
        ]


async def test_what_breaks_off_on_the_way_takes_no_room(
    batches: Batches, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(**_: object) -> None:
        raise Unavailable("the store does not answer")

    files = Files(client, "c", 10_000)
    monkeypatch.setattr(batches, "_add", gone)
    monkeypatch.setattr(files, "_add", gone)
    with pytest.raises(Unavailable):
        await batches.add(JOB, LINES, [(1, "bad")])
    with pytest.raises(Unavailable):
        await files.add("t", FileRecord("f", "in.jsonl", "batch", 7, 5.0), LINES)
    assert int(await client.get(STORED) or 0) == 0
    assert [key for key in await client.keys("*") if await client.ttl(key) < 0] == []


async def test_a_tenant_has_so_many_unfinished_jobs(batches: Batches, client: Redis) -> None:
    jobs = [replace(JOB, batch_id=f"b-{n}", total=2) for n in range(4)]
    first = await batches.add(jobs[0], ["a", "b"], [], 2)
    second = await batches.add(jobs[1], ["a", "b"], [], 2)
    taken = await client.get(STORED)
    with pytest.raises(Overloaded, match=r"limits\.batch_jobs: 2 .* cancel one"):
        await batches.add(jobs[2], ["a", "b"], [], 2)
    assert await client.get(STORED) == taken
    assert await client.keys(f"*:t/{jobs[2].batch_id}") == []
    await batches.add(replace(jobs[2], tenant="other"), ["a", "b"], [], 2)
    await serve(batches, first, "r-0")
    third = await batches.add(jobs[2], ["a", "b"], [], 2)
    await batches.cancel(second)
    with pytest.raises(Overloaded):  # until its lines have stopped
        await batches.add(jobs[3], ["a", "b"], [], 2)
    assert await batches.settle(second, "r-0", -1, NOW)
    await batches.add(jobs[3], ["a", "b"], [], 2)
    assert {job.name for job in await batches.active()} == {third.name, "t/b-3", "other/b-2"}


async def test_of_jobs_handed_in_at_once_as_many_are_taken_as_may_be(batches: Batches) -> None:
    jobs = [replace(JOB, batch_id=f"b-{n}", total=1) for n in range(8)]
    added = await asyncio.gather(
        *(batches.add(job, ["a"], [], 3) for job in jobs), return_exceptions=True
    )
    assert sum(isinstance(each, Overloaded) for each in added) == 5
    assert len(await batches.active()) == 3


async def test_tenants_have_their_own(batches: Batches, client: Redis) -> None:
    await batches.add(JOB, LINES, [])
    await batches.add(replace(JOB, batch_id="b-2", created_at=101.0), LINES, [])
    assert [job.batch_id for job in await batches.latest("t", 10)] == ["b-2", "b-1"]
    assert [job.batch_id for job in await batches.latest("t", 10, "b-2")] == ["b-1"]
    assert await batches.latest("other", 10) == []
    assert await batches.get("other", "b-1") is None
    files = Files(client, "c", 10_000)
    record = FileRecord("f", "in.jsonl", "batch", 7, 5.0)
    await files.add("t", record, ["a", "b"])
    assert await files.get("t", "f") == record
    assert (await files.get("other", "f"), await files.delete("other", "f")) == (None, None)
    assert await files.lines("t", "f") == ["a", "b"]
    assert await files.latest("t", 10) == [record]
    assert await files.delete("t", "f") == record
    assert (await files.delete("t", "f"), await files.latest("t", 10)) == (None, [])


async def test_jobs_survive_the_server(store: EmbeddedStore, tmp_path: Path) -> None:
    client = await connect(store.url, 30.0)
    batches = Batches(client, "c", 10_000)
    job = await batches.add(JOB, LINES, [(1, "bad")])
    await serve(batches, job, "r-0")
    await batches.claim(job, "r-0", NOW, UNTIL)
    before = await batches.get("t", "b-1")
    await client.aclose()
    store.stop()
    again = EmbeddedStore.start(tmp_path)
    try:
        client = await connect(again.url, 30.0)
        batches = Batches(client, "c", 10_000)
        assert await batches.get("t", "b-1") == before
        await serve(batches, job, "r-1", NOW)
        await serve(batches, job, "r-1", UNTIL)
        ended = await batches.get("t", "b-1")
        assert ended is not None and (ended.completed, ended.failed) == (TOTAL - 1, 1)
        await client.aclose()
    finally:
        again.stop()
