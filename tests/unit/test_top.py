"""What `pdserve top` makes of two looks."""

from __future__ import annotations

import io
import json
import os
import pty
from dataclasses import replace
from typing import Any, cast

import pytest
from rich.console import Console

from cluster.cli import calls, top, top_looks
from cluster.cli.calls import ClusterView, Quantiles, RouterView, ServedLately, WorkerView
from cluster.cli.terminal import Terminal
from cluster.cli.top_looks import Look
from cluster.cli.top_tables import WIDE_COLUMNS, tables
from cluster.cli.top_view import Frame, Rates, frame
from cluster.errors import Unavailable
from pdserve.v1 import operator_pb2


def worker(worker_id: str, role: str = "decode", **changes: Any) -> WorkerView:
    right = WorkerView(
        worker_id, "m", role, "ready", True, 3, 2, 4096, 30, 100, 1 << 30, "grpc", "h:1", "life",
        "", waiting_sequences=1, prompt_tokens=1000, output_tokens=100,
    )  # fmt: skip
    return replace(right, **changes)


LATELY = ServedLately(
    60.0, 40, 30, {"ttft": 8, "refused": 2}, Quantiles(0.1, 0.2, 0.3), Quantiles(0.01, 0.02, 0.03)
)
ROUTER = RouterView("router-0", "h:2", "h:3", "h:2", 7, {"standard": 2, "batch": 1}, LATELY)


def look(at: float, *workers: WorkerView, **changes: Any) -> Look:
    silent = changes.pop("silent", {})
    view = ClusterView("c", True, workers, (ROUTER,))
    return Look(at, 1e9 + at, replace(view, **changes), silent)


def drawn(shown: Frame, columns: int = 200) -> str:
    text = io.StringIO()
    Console(file=text, width=columns).print(tables(shown, columns))
    return text.getvalue()


def test_rates_are_of_the_same_life_between_two_looks() -> None:
    before = look(10.0, worker("a"), worker("b"), worker("c", connected=False))
    now = look(
        12.0,
        worker("a", prompt_tokens=2000, output_tokens=150),
        worker("b", incarnation="the next", prompt_tokens=5, output_tokens=1),
        worker("c"),
        worker("d"),
    )
    shown = frame(before, now)
    unknown = Rates(None, None)
    assert [w.rates for w in shown.workers] == [Rates(500.0, 25.0), unknown, unknown, unknown]
    assert shown.rates == Rates(500.0, 25.0)
    assert frame(now, replace(now, at=now.at)).rates == unknown


def test_a_worker_that_did_not_say_what_it_has_done_has_no_rates() -> None:
    silent = {"prompt_tokens": None, "output_tokens": None}
    spoke, did_not = look(10.0, worker("a")), look(12.0, worker("a", **silent))
    for before, now in ((spoke, did_not), (did_not, replace(spoke, at=14.0))):
        shown = frame(before, now)
        assert shown.rates == shown.workers[0].rates == Rates(None, None)
        json.dumps(shown.values(), allow_nan=False)


def test_json_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No `:100:` becomes an emoji."""
    terminal = Terminal()
    value = {"address": "10:100:1", "reason": ":100: [bold]"}
    terminal.json(value)
    assert json.loads(capsys.readouterr().out) == value
    top.JsonScreen(terminal).lost(":100:", 1.0)
    assert json.loads(capsys.readouterr().out)["error"] == ":100:"


def test_pools_are_sums_in_the_order_of_work() -> None:
    view = look(
        1.0,
        worker("x", "both"),
        worker("d-1", state="draining"),
        worker("d-0"),
        worker("p-0", "prefill"),
    )
    shown = frame(look(0.0), view)
    assert [(p.role, p.workers, p.ready) for p in shown.pools] == [
        ("prefill", 1, 1), ("decode", 2, 1), ("both", 1, 1),
    ]  # fmt: skip
    assert [w.view.worker_id for w in shown.workers] == ["p-0", "d-0", "d-1", "x"]
    decode = shown.pools[1]
    assert (decode.running, decode.waiting, decode.pinned_bytes) == (6, 2, 8192)
    assert decode.kv_share == 0.3


def test_routers_are_told_apart_from_those_that_are_silent() -> None:
    other = RouterView("router-1", "h:4", "h:5", "h:4", None)
    now = look(1.0, worker("d-0"), routers=(ROUTER, other), silent={"router-1": "gone"})
    shown = frame(look(0.0), now)
    assert (shown.running_requests, shown.queued_requests) == (7, 3)
    assert (shown.attainment, shown.requests) == (0.75, 40)
    text = drawn(shown)
    assert "100/200/300" in text and "10.0/20.0/30.0" in text
    assert "75.0%" in text and "2 refused, 8 ttft" in text
    assert "router-1 does not answer: gone" in text


@pytest.mark.parametrize("columns", [80, WIDE_COLUMNS])
def test_everything_fits_the_terminal(columns: int) -> None:
    busy = worker(
        "recall-tiny-decode-10", engine_blocks_used=100, prompt_tokens=10**9, pinned_bytes=1 << 38
    )
    shown = frame(look(0.0, worker("recall-tiny-decode-10")), look(1.0, busy))
    lines = drawn(shown, columns).splitlines()
    assert max(map(len, lines)) <= columns
    (row,) = (line for line in lines if line.startswith("recall-tiny-decode-10"))
    for part in ("decode", "ready", "100%", "256.0 GiB", "1,000M", "…"):
        assert (part in row) == (part != "…")
    assert ("1.0 GiB" in row) == (columns >= WIDE_COLUMNS)


def test_what_is_wrong_is_said() -> None:
    now = look(
        1.0,
        worker("a", ejected=True),
        worker("b", connected=False),
        worker("w", connected=False, state="waiting", detail="no host has 8 GPUs"),
        store_reachable=False,
        routers=(replace(ROUTER, lately=None),),
    )
    text = drawn(frame(look(0.0), now))
    for part in ("ejected", "no stream", "w waiting: no host has 8 GPUs", "the store does not"):
        assert part in text
    assert "no request ended within the last minute" in text


def test_names_are_no_markup() -> None:
    now = look(1.0, worker("[red]x[/nothing]", model="[bold"), cluster="[/]")
    assert "[red]x[/nothing]" in drawn(frame(look(0.0), now))


def test_a_refresh_is_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    shown = frame(look(0.0, worker("a")), look(2.0, worker("a", output_tokens=300)))
    screen = top.JsonScreen(Terminal())
    screen.show(shown)
    screen.lost("no router answers", 3.0)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["workers"][0]["output_tokens_per_second"] == 100.0
    assert first["pools"][0]["output_tokens_per_second"] == 100.0
    assert first["routers"][0]["lately"]["ttft_seconds"]["p99"] == 0.3
    assert (first["running_requests"], first["attainment"]) == (7, 0.75)
    assert second["error"] == "no router answers"


async def test_a_key_ends_the_wait_and_others_do_not() -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"x\n")
        assert not await top.Key(theirs, "q").pressed(0.05)
        os.write(ours, b"Q\n")
        assert await top.Key(theirs, "q").pressed(30.0)
        assert not await top.Key().pressed(0.0)
    finally:
        os.close(ours)
        os.close(theirs)


async def test_what_a_worker_did_not_say_it_did_is_not_0(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = operator_pb2.GetClusterResponse()
    reply.workers.add(worker_id="silent")
    reply.workers.add(worker_id="new").done.SetInParent()

    class Stub:
        def __init__(self, _: Any) -> None: ...

        async def GetCluster(self, *_: Any, **__: Any) -> Any:
            return reply

    monkeypatch.setattr(calls.operator_pb2_grpc, "OperatorStub", Stub)
    view = await calls.cluster_view(cast(Any, None))
    done = [(each.prompt_tokens, each.output_tokens) for each in view.workers]
    assert done == [(None, None), (0, 0)]


class Channel:
    closed = 0

    async def close(self) -> None:
        self.closed += 1


async def test_channels_to_what_does_not_answer_are_closed_and_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Channel] = []

    def channel(*_: str) -> Channel:
        made.append(Channel())
        return made[-1]

    async def view(to: Channel, *_: Any, router_only: bool = False) -> ClusterView:
        if router_only:
            raise Unavailable("dead")
        return ClusterView("c", True, (), (ROUTER, replace(ROUTER, operator_address="h:9")))

    monkeypatch.setattr(top_looks, "channel", channel)
    monkeypatch.setattr(top_looks, "cluster_view", view)
    async with top_looks.Watcher("h:1", "") as watcher:
        for _ in range(3):
            await watcher.look()
        assert [each.closed for each in made] == [0, 1, 1, 1]
    assert [each.closed for each in made] == [1, 1, 1, 1]
