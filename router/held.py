"""How much of a prompt the workers' prefix caches hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.prefix import FEW_TOKENS, block_hashes, few_hashes
from router.placement import WorkerView
from router.prefix_index import PrefixIndex


class HeldTokens:
    """Asks the index by a model's block size.

    It is asked when a request comes and when it is placed, mostly in the same turn: the last answer
    is kept until something changes.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._block_sizes: dict[str, int] = {}
        self._block_size_version = -1
        self._asked: Sequence[int] = ()
        self._question: tuple[str, str, int, int] | None = None
        self._answer: dict[int, int] = {}

    def see(self, version: int, views: Iterable[WorkerView | None]) -> None:
        """The fleet as it is; `version` changes with it."""
        if self._block_size_version != version:
            self._block_sizes = {v.model: v.block_size for v in views if v is not None}
            self._block_size_version = version

    def of(self, token_ids: Sequence[int], model: str, salt: str) -> dict[int, int]:
        """Tokens by holder; those that hold none are left out."""
        question = (model, salt, self._block_size_version, self._index.version)
        if self._asked is not token_ids or self._question != question:
            self._asked, self._question = token_ids, question
            self._answer = self._look_up(token_ids, model, salt)
        return self._answer

    def _look_up(self, token_ids: Sequence[int], model: str, salt: str) -> dict[int, int]:
        size = self._block_sizes.get(model, 0)
        if not size or len(token_ids) < size:
            return {}
        few = len(token_ids) <= FEW_TOKENS
        names = few_hashes(token_ids, size, salt) if few else block_hashes(token_ids, size, salt)
        return {slot: depth * size for slot, depth in self._index.held(names).items()}
