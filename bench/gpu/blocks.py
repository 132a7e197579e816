"""Sums over the KV blocks that a handoff read or wrote, so that both sides' can be compared."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from cluster.kv.agent import HandoffAgent
from cluster.kv.paged import PagedCache
from cluster.kv.reservation import Reserve
from cluster.kv.sender import Offer

REMEMBERED = 256


class BlockSums:
    """Remembers which blocks the latest handoffs used, on either side of one engine rank.

    Blocks keep their content after a request until they are handed out again, so sums are right as
    long as little has run since.
    """

    def __init__(self, agent: HandoffAgent, cache: PagedCache) -> None:
        self._cache = cache
        self._blocks: OrderedDict[str, list[int]] = OrderedDict()
        self._offer, self._reserve = agent.sender.offer, agent.receiver.reserve
        agent.sender.offer = self._offered  # type: ignore[method-assign]
        agent.receiver.reserve = self._reserved  # type: ignore[method-assign, assignment]

    def _offered(self, offer: Offer) -> None:
        self._keep(offer.handoff_id, offer.first_block, offer.block_ids)
        self._offer(offer)

    def _reserved(self, reserve: Reserve, *rest: Any) -> None:
        self._keep(reserve.handoff_id, 0, reserve.block_ids)
        self._reserve(reserve, *rest)

    def _keep(self, handoff_id: str, first: int, block_ids: tuple[int, ...]) -> None:
        known = self._blocks.setdefault(handoff_id, [])
        known[first:] = block_ids
        while len(self._blocks) > REMEMBERED:
            self._blocks.popitem(last=False)

    def sums(self, handoff_id: str) -> list[list[int]]:
        """By layer and block of the prompt, each hanging on every byte and its place; a block's
        other tokens count, too."""
        cache, ids = self._cache, self._blocks[handoff_id]
        words = torch.arange(cache.block_bytes // 2, dtype=torch.int64, device=cache.device) * 2 + 1
        found = []
        for layer in range(cache.num_layers):
            blocks = cache.blocks(layer, ids).reshape(len(ids), -1).view(torch.int16)
            sums = [(part.to(torch.int64) * words).sum(1) for part in blocks.split(64)]
            found.append(torch.cat(sums).tolist())
        return found
