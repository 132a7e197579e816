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
            num_layers=data.draw(st.sampled_from([1, 1, 1, 2, layers, 0, 1 << 31])),
            first_block=data.draw(st.integers(0, total)),
            num_blocks=data.draw(st.integers(0, total)),
        )
        whole = run.num_layers * run.num_blocks * BLOCK
        size = data.draw(st.sampled_from([whole] * 3 + [0, 1, run.num_blocks * BLOCK]))
        right = (
            run.sequence == frames
            and run.layer >= 0
            and run.num_layers >= 1
            and run.layer + run.num_layers <= layers
            and set(due[run.layer : run.layer + run.num_layers]) == {run.first_block}
            and run.num_blocks >= 1
            and run.first_block + run.num_blocks <= total
            and size == whole
        )
        try:
            assembly.check(run, size)
            accepted = True
        except HandoffRefused:
            accepted = False
        assert accepted == right
        if accepted:
            assembly.accept(run, size)
            for layer in range(run.layer, run.layer + run.num_layers):
                due[layer] += run.num_blocks
            frames += 1
        assert assembly.complete == all(d == total for d in due)
        assert assembly.owed == sum(total - d for d in due) * BLOCK
    assert assembly.bytes == sum(d - held for d in due) * BLOCK
