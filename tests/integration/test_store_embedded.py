"""The embedded Valkey and everything that lives in it, against the real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from cluster.errors import ConfigError, Unavailable
from cluster.store import embedded
from cluster.store import registry as module
from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.journal import Journal
from cluster.store.records import JournalEntry, RouterRecord, WorkerRecord
from cluster.store.registry import Members, Registry

WORKER = WorkerRecord(
    worker_id="m-prefill-0",
    incarnation="aa",
    model="m",
    role="prefill",
    state="starting",
    transfer_addresses=("127.0.0.1:1", "127.0.0.1:2"),
    started_at=100.0,
)
ROUTER = RouterRecord("router-0", "aa", "127.0.0.1:50051", "127.0.0.1:8000", started_at=100.0)


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


@pytest.mark.parametrize(("last", "ours"), [(b"+OK\r\n+PONG\r\n", True), (b"-ERR\r\n" * 2, False)])
def test_a_server_that_loads_what_it_holds_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, last: bytes, ours: bool
) -> None:
    """As one does that kept so much that it is asked before it has read all of it."""
    loading = b"+OK\r\n-LOADING Valkey is loading the dataset in memory\r\n"
    sleeping = subprocess.Popen(["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as listener, sleeping as it:

        def serve() -> None:
            for reply in (b"", loading, loading, last):
                with listener.accept()[0] as conn:
                    conn.recv(256)
                    conn.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        assert embedded._answers(it, listener.getsockname()[1], "password") is ours  # type: ignore[arg-type]
        it.kill()


async def test_a_record_comes_back_as_it_was_put(client: Redis) -> None:
    registry = Registry(client, "c")
    assert await registry.put_worker(WORKER, 5)
    assert await registry.get_worker("m-prefill-0") == WORKER
    assert await registry.workers() == [WORKER]
    assert await Registry(client, "other").workers() == []


async def test_what_a_later_version_has_added_to_a_record_is_passed_over(client: Redis) -> None:
    registry = Registry(client, "c")
    await registry.put_worker(WORKER, 5)
    await registry.put_router(ROUTER, 5)
    for key in ("worker:m-prefill-0", "router:router-0"):
        raw = json.loads(await client.get(f"pdserve:{{c}}:{key}"))
        await client.set(f"pdserve:{{c}}:{key}", json.dumps({**raw, "new": [1]}))
    assert await registry.members() == Members((WORKER,), (ROUTER,))


async def test_a_lease_that_is_not_renewed_drops_the_worker_and_its_index_entry(
    client: Redis,
) -> None:
    registry = Registry(client, "c")
    key = "pdserve:{c}:worker:m-prefill-0"
    await registry.put_worker(WORKER, 30)
    for _ in range(3):
        assert await registry.renew_worker("m-prefill-0", "aa", 60)
        assert await client.pttl(key) > 30_000
        await client.pexpire(key, 30_000)
    assert await registry.renew_worker("m-prefill-0", "aa", 0.1)
    await asyncio.sleep(0.3)
    assert not await registry.renew_worker("m-prefill-0", "aa", 0.2)
    assert await client.scard("pdserve:{c}:workers") == 1
    assert await registry.workers() == []
    assert await client.scard("pdserve:{c}:workers") == 0


async def test_an_older_life_never_overwrites_a_newer_one(client: Redis) -> None:
    registry = Registry(client, "c")
    newer = replace(WORKER, incarnation="bb", started_at=101.0)
    assert await registry.put_worker(WORKER, 5)
    assert await registry.put_worker(newer, 0.2)
    assert not await registry.put_worker(WORKER, 5)
    assert not await registry.renew_worker("m-prefill-0", "aa", 5)
    assert await registry.get_worker("m-prefill-0") == newer
    await asyncio.sleep(0.3)  # not even after the newer life's lease has run out
    assert not await registry.put_worker(WORKER, 5)


async def test_two_lives_of_the_same_instant_have_one_winner(client: Redis) -> None:
    registry = Registry(client, "c")
    other = replace(WORKER, incarnation="bb")
    results = {await registry.put_worker(WORKER, 5), await registry.put_worker(other, 5)}
    assert await registry.get_worker("m-prefill-0") == other
    assert not await registry.put_worker(WORKER, 5)
    assert results == {True}


async def test_only_the_life_that_is_registered_can_be_removed(client: Redis) -> None:
    registry = Registry(client, "c")
    await registry.put_worker(WORKER, 5)
    assert not await registry.remove_worker("m-prefill-0", "zz")
    assert await registry.remove_worker("m-prefill-0", "aa")
    assert await registry.workers() == []


async def test_routers_are_members_of_their_own(client: Redis) -> None:
    registry = Registry(client, "c")
    assert await registry.put_router(ROUTER, 5)
    assert await registry.routers() == [ROUTER]
    assert await registry.workers() == []
    assert not await registry.remove_router("router-0", "zz")
    assert await registry.remove_router("router-0", "aa")
    assert await registry.routers() == []


async def test_changes_and_the_end_of_a_lease_are_seen_without_a_poll(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 3600.0)
    registry = Registry(client, "c")
    changes = registry.changes()
    assert (await anext(changes)).workers == ()
    pending = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.05)
    await registry.put_worker(WORKER, 60)
    async with asyncio.timeout(30):  # far below what nothing but a message or a lease's end cuts
        assert (await pending).workers == (WORKER,)
        await registry.put_worker(replace(WORKER, state="ready"), 0.3)
        while (await anext(changes)).workers:
            pass
    await changes.aclose()


async def test_a_change_whose_message_was_lost_is_seen_with_a_poll(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    registry = Registry(client, "c")
    await registry.put_worker(WORKER, 3600)
    changes = registry.changes()
    assert (await anext(changes)).workers == (WORKER,)
    later = replace(WORKER, state="draining")
    await client.set("pdserve:{c}:worker:m-prefill-0", later.to_json(), keepttl=True)
    async with asyncio.timeout(30):
        assert (await anext(changes)).workers == (later,)
    await changes.aclose()


async def test_following_the_changes_can_be_cancelled_at_any_moment(client: Redis) -> None:
    registry = Registry(client, "c")
    await registry.put_worker(WORKER, 60)

    async def follow() -> None:
        async for _ in registry.changes():
            pass

    for i in range(100):
        task = asyncio.create_task(follow())
        await asyncio.sleep(i / 5000)
        task.cancel()
        await asyncio.wait({task}, timeout=30)
        assert task.cancelled(), f"cancelled after {i / 5} ms and still running"


async def test_the_journal_keeps_the_latest_entry_and_its_cap(client: Redis) -> None:
    journal = Journal(client, "c", max_entries=3)
    entries = [JournalEntry(f"r{i}", "m", "done", "router-0", 5, received_at=i) for i in range(5)]
    await journal.record(entries[:1])
    await journal.record(entries[1:])
    await journal.record([replace(entries[4], state="failed", error="gone")])
    assert await journal.get("r0") is None
    assert (await journal.get("r4")) == replace(entries[4], state="failed", error="gone")
    assert [e.request_id for e in await journal.latest(9)] == ["r4", "r3", "r2"]
    theirs = replace(entries[4], tenant="other")  # ids are the tenants' own
    await journal.record([theirs])
    assert await journal.get("r4") == replace(entries[4], state="failed", error="gone")
    assert await journal.get("r4", "other") == theirs
    assert 0 < await client.ttl("pdserve:{c}:journal:entry:default/r4") <= 24 * 3600


async def test_every_call_says_unavailable_when_the_store_is_gone(
    store: EmbeddedStore, client: Redis
) -> None:
    registry, journal = Registry(client, "c"), Journal(client, "c")
    changes = registry.changes()
    await anext(changes)
    store.stop()
    for call in (
        registry.workers(),
        registry.put_worker(WORKER, 5),
        registry.renew_worker("m-prefill-0", "aa", 5),
        registry.remove_router("router-0", "aa"),
        journal.get("r"),
        anext(changes),
    ):
        with pytest.raises(Unavailable, match="does not answer"):
            await call


async def test_connect_names_what_is_wrong_and_never_the_password(store: EmbeddedStore) -> None:
    wrong = store.url.replace("redis://:", "redis://:hunter2")
    no_password = "redis://" + store.url.split("@")[1]
    for url, said, seconds in (
        (wrong, "refuses the password", 30.0),
        (no_password, "password", 30.0),
        ("redis://:hunter2@127.0.0.1:1/0", "does not answer", 0.5),
        ("redis://:hunter2@no-such-host.invalid:1/0", "does not answer", 0.5),
    ):
        with pytest.raises(Unavailable, match=said) as caught:
            await connect(url, seconds)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"store\.url"):
        await connect("http://127.0.0.1", 0.5)


def test_the_server_keeps_its_password_off_disk_and_command_line(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    password = store.url.split(":")[2].split("@")[0]
    assert password not in " ".join(psutil.Process(store.pid).cmdline())
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or password.encode() not in path.read_bytes()


def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from cluster.store.embedded import EmbeddedStore;"
        f"s = EmbeddedStore.start(pathlib.Path({str(tmp_path)!r}));"
        "print(s.pid, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    server.wait(30)
