"""What of a handoff has landed: the decode side's judge of every frame.

Pure. A frame is refused unless it is exactly what was announced: the next in order, of layers and
blocks this route owes, each once, of the right size. `complete` only when every (layer, block) of
the range has been accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import HandoffRefused


@dataclass(frozen=True)
class BlockRun:
    """The header of a frame of blocks: the same blocks of `num_layers` layers."""

    sequence: int
    layer: int
    num_layers: int
    first_block: int
    num_blocks: int


class Assembly:
    """Coverage of one route of a handoff.

    Args:
        num_layers: layers of the model.
        first_block: blocks of the prompt, of prefill's size, that decode already holds whole; they
            are not sent.
        num_blocks: blocks of the whole prompt.
        block_bytes: bytes of one block of one layer, of this route's heads.
    """

    def __init__(
        self, num_layers: int, first_block: int, num_blocks: int, block_bytes: int
    ) -> None:
        self._block_bytes = block_bytes
        self._last = num_blocks
        self._next = [first_block] * num_layers
        self.frames = 0
        self.bytes = 0

    def check(self, run: BlockRun, payload_bytes: int) -> None:
        """Judges a frame by its header and size, before its payload is looked at.

        Blocks of a layer come in order, so a gap, a repetition and an overlap are all the same
        fault: not the next block.

        Raises:
            HandoffRefused: it is not the frame that may come next.
        """
        if run.sequence != self.frames:
            raise HandoffRefused(f"frame {run.sequence} came where {self.frames} was due")
        if run.layer < 0 or run.num_layers < 1 or run.layer + run.num_layers > len(self._next):
            raise HandoffRefused(
                f"frame {run.sequence}: layers {run.layer}+{run.num_layers} of {len(self._next)}"
            )
        for layer in range(run.layer, run.layer + run.num_layers):
            due = self._next[layer]
            if run.first_block != due:
                raise HandoffRefused(
                    f"frame {run.sequence}: layer {layer} block {run.first_block} came where"
                    f" {due} was due"
                )
        if run.num_blocks < 1 or run.first_block + run.num_blocks > self._last:
            raise HandoffRefused(
                f"frame {run.sequence}: blocks {run.first_block}+{run.num_blocks} of {self._last}"
            )
        if payload_bytes != run.num_layers * run.num_blocks * self._block_bytes:
            raise HandoffRefused(
                f"frame {run.sequence}: {payload_bytes} bytes for {run.num_blocks} blocks of"
                f" {self._block_bytes} in {run.num_layers} layers"
            )

    def accept(self, run: BlockRun, payload_bytes: int) -> None:
        """The frame passed `check` and its checksum, and its blocks have been written."""
        for layer in range(run.layer, run.layer + run.num_layers):
            self._next[layer] += run.num_blocks
        self.frames += 1
        self.bytes += payload_bytes

    @property
    def owed(self) -> int:
        """Bytes still to come."""
        return sum(self._last - due for due in self._next) * self._block_bytes

    @property
    def complete(self) -> bool:
        """Every (layer, block) has been accepted."""
        return all(due == self._last for due in self._next)
