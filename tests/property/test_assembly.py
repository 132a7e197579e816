"""The assembly accepts exactly the frames that are due, in any interleaving of layers, and is
complete exactly when every block of every layer has come."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import HandoffRefused
from cluster.kv.assembly import Assembly, BlockRun

BLOCK = 16


@settings(deadline=None)
@given(st.data())
def test_only_what_is_due_is_accepted(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4))
    total = data.draw(st.integers(1, 8))
    held = data.draw(st.integers(0, total - 1))
    assembly = Assembly(layers, held, total, BLOCK)
    due = [held] * layers
    frames = 0
    for _ in range(60):
        run = BlockRun(
            sequence=data.draw(st.sampled_from([frames, frames, frames, frames + 1])),
            layer=data.draw(st.integers(-1, layers)),
            first_block=data.draw(st.integers(0, total)),
            num_blocks=data.draw(st.integers(0, total)),
            checksum=0,
        )
        size = data.draw(st.sampled_from([run.num_blocks * BLOCK] * 3 + [0, 1]))
        right = (
            run.sequence == frames
            and 0 <= run.layer < layers
            and run.first_block == due[run.layer]
            and run.num_blocks >= 1
            and run.first_block + run.num_blocks <= total
            and size == run.num_blocks * BLOCK
        )
        try:
            assembly.check(run, size)
            accepted = True
        except HandoffRefused:
            accepted = False
        assert accepted == right
        if accepted:
            assembly.accept(run, size)
            due[run.layer] += run.num_blocks
            frames += 1
        assert assembly.complete == all(d == total for d in due)
    assert assembly.bytes == sum(d - held for d in due) * BLOCK
