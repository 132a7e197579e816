"""However the two sides are cut, every head of every decode rank comes from exactly one prefill
rank that holds it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import HandoffRefused
from cluster.kv.geometry import OPAQUE, PLAIN, KvGeometry, routes, same_blocks

powers = st.sampled_from([1, 2, 4, 8, 16])


@given(powers, powers, powers)
def test_every_head_comes_from_one_rank_that_holds_it(heads: int, p: int, d: int) -> None:
    prefill, decode = KvGeometry(p, heads, 16), KvGeometry(d, heads, 16)
    got: dict[tuple[int, int], int] = {}
    for route in routes(prefill, decode):
        source, target = prefill.heads_of(route.prefill_rank), decode.heads_of(route.decode_rank)
        assert route.source.count == route.target.count > 0
        for i in range(route.source.count):
            head = source.start + route.source.start + i
            assert head < source.stop
            assert head == target.start + route.target.start + i
            key = (route.decode_rank, head)
            assert key not in got, "sent twice"
            got[key] = route.prefill_rank
    assert set(got) == {
        (rank, head)
        for rank in range(d)
        for head in range(decode.heads_of(rank).start, decode.heads_of(rank).stop)
    }


@given(powers, powers)
def test_replicated_heads_are_taken_from_every_holder(p: int, d: int) -> None:
    used = {r.prefill_rank for r in routes(KvGeometry(p, 1, 16), KvGeometry(d, 1, 16))}
    assert len(used) == min(p, d)


def test_what_no_engine_can_be_is_refused() -> None:
    for text in ["", "x", "1x1", "0x1x16xplain", "3x8x16xplain", "128x8x16xplain", "1x0x16xplain",
                 "1x8x99999999xplain", "axbxcxd"]:  # fmt: skip
        with pytest.raises(HandoffRefused):
            KvGeometry.parse(text)
    geometry = KvGeometry(2, 8, 16, "cpu-vec16")
    assert KvGeometry.parse(geometry.encode()) == geometry


def test_blocks_of_an_unknown_order_move_only_as_they_are() -> None:
    opaque = KvGeometry(1, 8, 16, f"{OPAQUE}flashinfer")
    assert routes(opaque, opaque) and same_blocks(opaque, opaque)
    for other in (KvGeometry(1, 8, 32, opaque.packing), KvGeometry(1, 8, 16, PLAIN)):
        with pytest.raises(HandoffRefused, match="give both sides one block_size"):
            routes(opaque, other)


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(HandoffRefused, match="8 KV heads on prefill, 4 on decode"):
        routes(KvGeometry(1, 8, 16), KvGeometry(1, 4, 16))
