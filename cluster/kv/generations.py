"""Block generations: which use of a block a handoff means.

vLLM hands a block out again as soon as nothing refers to it. Each time it does, its generation
grows – in the engine's thread, before the step that may overwrite it starts. A copy whose blocks
have other generations after it than the handoff was given is a copy of somebody else's KV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Stamp = npt.NDArray[np.uint32]


class Generations:
    """Generation by block id. Written by the engine's thread, read by the agent's.

    Attributes:
        renewals: how often any block has been; while it is the same, so is what `still` says.
    """

    def __init__(self, num_blocks: int) -> None:
        self._of = np.zeros(num_blocks, dtype=np.uint32)
        self.renewals = 0

    def renew(self, block_ids: Sequence[int]) -> None:
        """These blocks have been handed out anew."""
        if block_ids:
            np.add.at(self._of, np.asarray(block_ids), 1)
            self.renewals += 1  # behind it: who finds the old number may have looked before

    def stamp(self, block_ids: Sequence[int]) -> Stamp:
        """What they are now; raises IndexError for a block that is not there."""
        return self._of[np.asarray(block_ids, dtype=np.int64)].copy()

    def still(self, block_ids: Sequence[int] | npt.NDArray[np.int64], stamp: Stamp) -> bool:
        """None of them has been handed out anew since `stamp`."""
        return bool((self._of[np.asarray(block_ids, dtype=np.int64)] == stamp).all())
