"""The connector's half next to the cache: what a step tells the agent, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.kv.connector.step import StepMetadata
from cluster.kv.connector.worker import ConnectorConfig, WorkerSide
from cluster.kv.generations import Generations
from cluster.kv.handoff import HandoffParams
from cluster.kv.reservation import Reserve
from cluster.kv.sender import Arrival, Offer, Release

TOKENS, LAYERS, BLOCK_BYTES = 4, 3, 100


class Agent:
    """Writes down what it is told, and in how many calls."""

    def __init__(self) -> None:
        self.frame_bytes = 1
        self.calls = 0
        self.heard: list[tuple[str, Any]] = []
        self.generations = Generations(16)
        self.sender = SimpleNamespace(
            arrive=lambda arrival: self.heard.append(("arrive", arrival.request)),
            offer=lambda offer: self.heard.append(("offer", offer.handoff_id)),
            release=lambda release: self.heard.append(("sent", release.handoff_id)),
            fail=lambda handoff_id: self.heard.append(("fail", handoff_id)),
            layer_ready=lambda layer, offers, fence: self.heard.append(("layer", layer)),
            when_read=self._when_read,
        )
        self.receiver = SimpleNamespace(
            reserve=lambda reserve, stamp, free: self.heard.append(("reserve", stamp.tolist())),
            release=lambda handoff_id: self.heard.append(("received", handoff_id)),
        )

    def _when_read(self, handoffs: list[str], call: Any) -> None:
        self.heard.append(("read", handoffs))
        call()

    def post(self, call: Any) -> None:
        self.calls += 1
        call()


@pytest.fixture
def side() -> WorkerSide:
    side = WorkerSide(ConnectorConfig("w", "life", "digest", {}, 0), None)  # type: ignore[arg-type]
    side.agent = Agent()  # type: ignore[assignment]
    side.cache = SimpleNamespace(  # type: ignore[assignment]
        tokens=TOKENS, block_bytes=BLOCK_BYTES, fence=lambda: None
    )
    side._layers = {f"layer.{i}": i for i in range(LAYERS)}
    return side


def heard(side: WorkerSide) -> list[tuple[str, Any]]:
    assert isinstance(side.agent, Agent)
    return side.agent.heard


ARRIVAL = Arrival("p", HandoffParams("prefill", "h", "ticket", 8, 10.0))
RESERVE = Reserve("d", "h", "ticket", 12, (3, 4, 5), TOKENS, 10.0)


def test_what_came_and_went_between_two_steps_begins_before_it_ends(side: WorkerSide) -> None:
    """Otherwise the end would be for nobody, and the beginning for ever."""
    side.begin_step(
        StepMetadata(
            arrivals=(ARRIVAL,),
            sent=(Release("h", None),),
            reserves=(RESERVE,),
            received=("h",),
        )
    )
    kinds = [kind for kind, _ in heard(side)]
    assert kinds.index("arrive") < kinds.index("sent")
    assert kinds.index("reserve") < kinds.index("received")


def test_blocks_are_of_a_new_generation_before_anything_refers_to_them(side: WorkerSide) -> None:
    """Those a step hands out; of a reservation, all that it does not share."""
    assert side.agent is not None
    old = side.agent.generations.stamp(range(16))
    side.begin_step(StepMetadata(allocated=(1, 2), reserves=(RESERVE,)))
    assert (side.agent.generations.stamp(range(16)) - old).tolist() == [
        0, 1, 1, 0, 1, 1, *[0] * 10,
    ]  # fmt: skip
    assert heard(side) == [("reserve", [0, 1, 1])]


def test_what_no_window_reaches_is_nobodys_own(side: WorkerSide) -> None:
    """vLLM's null block stands there in every prompt at once: one reservation ends no other's."""
    assert side.agent is not None
    one = Reserve("d", "h", "ticket", 16, (0, 0, 3, 4), 0, 10.0)
    other = Reserve("e", "i", "ticket", 16, (0, 0, 5, 6), 0, 10.0)
    side.begin_step(StepMetadata(reserves=(one,)))
    side.begin_step(StepMetadata(reserves=(other,)))
    assert heard(side) == [("reserve", [0, 0, 1, 1])] * 2
    assert side.agent.generations.still(one.block_ids, np.array([0, 0, 1, 1]))


def test_each_layer_is_announced_once_and_the_silent_ones_at_the_end(side: WorkerSide) -> None:
    """Inside a CUDA graph the engine announces nothing."""
    side.begin_step(StepMetadata(offers=(Offer("h", 0, (1, 2), last=True),)))
    side.layer_written("layer.1")
    side.step_written()
    layers = [layer for kind, layer in heard(side) if kind == "layer"]
    assert layers == [1, 0, 2]
    side.end_step()
    side.step_written()
    assert [layer for kind, layer in heard(side) if kind == "layer"] == layers


@pytest.mark.parametrize(("frame_bytes", "calls"), [(1, 3), (400, 2), (600, 1), (10_000, 1)])
def test_a_frames_layers_are_announced_together(
    side: WorkerSide, frame_bytes: int, calls: int
) -> None:
    assert isinstance(side.agent, Agent)
    side.agent.frame_bytes = frame_bytes
    side.begin_step(
        StepMetadata(offers=(Offer("h", 0, (1,), last=True), Offer("i", 0, (2,), last=True)))
    )
    begun = side.agent.calls
    for layer in range(LAYERS):
        side.layer_written(f"layer.{layer}")
    side.step_written()
    assert [layer for kind, layer in heard(side) if kind == "layer"] == [0, 1, 2]
    assert side.agent.calls - begun == calls


def test_a_step_without_handoffs_posts_nothing(side: WorkerSide) -> None:
    side.begin_step(StepMetadata())
    side.layer_written("layer.0")
    side.step_written()
    assert heard(side) == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_waits_until_blocks_that_do_not_stay_have_been_read(
    side: WorkerSide, kept: bool
) -> None:
    side._kept = kept
    side.begin_step(StepMetadata(offers=(Offer("a", 0, (1,), last=True),)))
    side.step_written()
    assert heard(side)[-1] == (("layer", LAYERS - 1) if kept else ("read", ["a"]))
