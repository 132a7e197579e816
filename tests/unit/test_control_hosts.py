"""Where lives should go, and why they cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.control.hosts import NODE_ID, Host, Need, Placed, avoiding, lacking, matches, preferred

GPU = {"ray.io/accelerator-type": "H100"}
A = Host("a", "10.0.0.1", {"CPU": 8, "GPU": 2}, GPU)
B = Host("b", "10.0.0.2", {"CPU": 8, "GPU": 2}, GPU)
C = Host("c", "10.0.0.3", {"CPU": 64}, {})
ONE = Need("decode", {"CPU": 1, "GPU": 1}, {})
PACKED = Need("decode", {"CPU": 1, "GPU": 1}, {}, "pack")


def place(need: Need, count: int) -> list[str]:
    placed: list[Placed] = []
    for _ in range(count):
        placed.append(Placed(preferred(need, (A, B, C), placed), need))
    return [life.node_id for life in placed]


def test_spread_takes_every_host_before_it_takes_one_twice() -> None:
    assert place(ONE, 4) == ["a", "b", "a", "b"]


def test_pack_fills_a_host_before_it_takes_another() -> None:
    assert place(PACKED, 4) == ["a", "a", "b", "b"]


def test_pools_are_spread_each_for_itself_and_then_among_each_other() -> None:
    other = Need("prefill", {"CPU": 1, "GPU": 1}, {})
    assert preferred(ONE, (A, B, C), [Placed("a", other)]) == "b"
    assert preferred(ONE, (A, B, C), [Placed("a", other), Placed("b", ONE)]) == "a"


def test_without_room_nothing_is_preferred_and_nothing_is_lacking() -> None:
    full = [Placed(host.node_id, Need("x", {"GPU": 2}, {})) for host in (A, B)]
    assert preferred(ONE, (A, B, C), full) == ""
    assert lacking(ONE, (A, B, C)) == ""


def test_labels_choose_hosts() -> None:
    need = Need("router", {"CPU": 1}, {"ray.io/accelerator-type": "!H100"})
    assert preferred(need, (A, B, C), []) == "c"


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (Need("p", {"GPU": 8}, {}), "no host has 8 GPU: the most is 2, on 10.0.0.1"),
        (Need("p", {"TPU": 1}, {}), "no host has 1 TPU: none has any"),
        (Need("p", {"CPU": 32, "GPU": 1}, {}), "no host has 32 CPU, 1 GPU together"),
        (Need("p", {"CPU": 1}, {"zone": "eu"}), "no host has the labels zone=eu"),
        (avoiding(ONE, ("a", "b", "c")), "no host is there but those that leave"),
        (
            avoiding(Need("p", {"CPU": 1}, {"zone": "eu"}), ("a",)),
            "no host, but for those that leave, has the labels zone=eu",
        ),
    ],
)
def test_what_no_host_has_is_named(need: Need, said: str) -> None:
    hosts = [replace(h, labels={**h.labels, NODE_ID: h.node_id}) for h in (A, B, C)]
    assert lacking(need, hosts) == said


def test_a_host_that_leaves_is_avoided() -> None:
    hosts = [Host(h.node_id, h.address, h.resources, {NODE_ID: h.node_id}) for h in (A, B)]
    need = avoiding(ONE, {"a"})
    assert preferred(need, hosts, []) == "b"
    assert preferred(avoiding(ONE, {"a", "b"}), hosts, []) == ""
    assert avoiding(ONE, ()) is ONE


def test_without_hosts_there_is_nothing_to_compare() -> None:
    assert lacking(ONE, ()) == "there is no host"


@pytest.mark.parametrize(
    ("selector", "value", "met"),
    [
        ("v", "v", True),
        ("v", None, False),
        ("!v", "v", False),
        ("!v", None, True),
        ("in(v, w)", "w", True),
        ("!in(v,w)", "w", False),
        ("!in(v,w)", "x", True),
    ],
)
def test_selectors_mean_what_they_mean_to_ray(selector: str, value: str, met: bool) -> None:
    assert matches(selector, value) is met
