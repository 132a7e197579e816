"""Engines of several ranks over one made-up model's KV, cut and packed as each likes: a handoff
between any two of them must land the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cluster.kv.agent import HandoffAgent
from cluster.kv.doorkeeper import Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.packing import Packing
from cluster.kv.paged import PagedCache
from cluster.kv.transport.choose import TransportOptions
from cluster.ticket import Ticket
from tests.handoff.agents import (
    CONTENT,
    LAYERS,
    SIGNER,
    WHERE,
    Decode,
    Prefill,
    Side,
    make_ticket,
)


def packed(tokens: int, seed: int) -> Packing:
    """A made-up attention kernel's order of a block."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens * CONTENT, generator=generator)
    return Packing(tokens, CONTENT, f"kernel-{seed}", order)


class Engine:
    """One agent and one cache a rank, filled with random KV.

    Args:
        blocks: of each rank's cache.
    """

    def __init__(
        self,
        name: str,
        ranks: int,
        heads: int,
        tokens: int,
        packing: Packing | None = None,
        blocks: int = 40,
    ) -> None:
        packing = packing or Packing(tokens, CONTENT)
        self.geometry = KvGeometry(ranks, heads, tokens, packing.name)
        self.blocks = blocks
        self.sides: list[Side] = []
        generator = torch.Generator().manual_seed(ranks * 1000 + tokens)
        model = torch.rand(LAYERS, blocks, heads, tokens, CONTENT, generator=generator)
        if packing.order is not None:
            plain = model.flatten(3)
            model = torch.empty_like(plain)
            model[..., packing.order] = plain
            model = model.view(LAYERS, blocks, heads, tokens, CONTENT)
        for rank in range(ranks):
            run = self.geometry.heads_of(rank)
            layers = {
                f"layer.{i}": model[i, :, run.start : run.stop].clone().to(WHERE.of(name))
                for i in range(LAYERS)
            }
            cache = PagedCache(layers, packing)
            agent = HandoffAgent(
                cache,
                SIGNER,
                Terms(name, f"{name}-life", "layout", self.geometry, rank),
                vocab_size=100,
                options=TransportOptions(WHERE.transport, "127.0.0.1", 4096, max_streams=64),
            )
            agent.start()
            self.sides.append((Prefill if name == "prefill" else Decode)(agent, cache))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        for side in self.sides:
            side.agent.stop()

    @property
    def prefills(self) -> list[Prefill]:
        return [side for side in self.sides if isinstance(side, Prefill)]

    @property
    def decodes(self) -> list[Decode]:
        return [side for side in self.sides if isinstance(side, Decode)]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(side.agent.address for side in self.sides)

    def kv(self, block_ids: Iterable[int], rank: int) -> torch.Tensor:
        """`[layers, heads of the rank, tokens of those blocks, content]`, plain."""
        cache = self.sides[rank].cache
        items = [layer.view(torch.float32)[list(block_ids)] for layer in cache._items]
        layers = torch.stack(items).cpu()
        if cache.packing.order is not None:
            shape = layers.shape
            layers = layers.flatten(3)[..., cache.packing.order].view(shape)
        return layers.transpose(1, 2).flatten(2, 3)

    def model_kv(self, block_ids: Iterable[int]) -> torch.Tensor:
        """The same of all the model's heads; asserts that ranks with the same head agree."""
        ids = list(block_ids)
        heads: dict[int, torch.Tensor] = {}
        for rank in range(self.geometry.ranks):
            run, kv = self.geometry.heads_of(rank), self.kv(ids, rank)
            for i, head in enumerate(range(run.start, run.stop)):
                assert head not in heads or torch.equal(heads[head], kv[:, i])
                heads[head] = kv[:, i]
        return torch.stack([heads[head] for head in sorted(heads)], dim=1)

    def blocks_for(self, num_tokens: int, first: int = 1) -> tuple[int, ...]:
        """Block ids for a prompt, in no particular order."""
        count = -(-num_tokens // self.geometry.tokens)
        ids = range(first, first + count)
        assert ids.stop <= self.blocks
        return (*ids[1::2], *ids[::2])

    def pinned(self) -> int:
        return sum(side.pinned() for side in self.sides)


def ticket_between(prefill: Engine, decode: Engine, num_tokens: int, seconds: float = 20) -> Ticket:
    return make_ticket(
        num_tokens,
        seconds,
        prefill_geometry=prefill.geometry.encode(),
        decode_geometry=decode.geometry.encode(),
    )


def compute(
    prefill: Engine, decode: Engine, ticket: Ticket, ranks: Iterable[int], chunks: int = 1
) -> tuple[int, ...]:
    """These ranks of prefill compute the prompt, in that many steps; returns its blocks."""
    wire, ids = SIGNER.sign(ticket), prefill.blocks_for(ticket.num_tokens)
    step = -(-len(ids) // chunks)
    for rank in ranks:
        side = prefill.prefills[rank]
        side.arrive(ticket, wire, *decode.addresses)
        for first in range(0, len(ids), step):
            side.compute(ticket, ids[first : first + step], first)
        side.release(ticket, token=42)
    return ids


def reserve(decode: Engine, ticket: Ticket, held_blocks: int = 0) -> tuple[int, ...]:
    """Every rank of decode takes the same blocks; the first of them are held already."""
    ids = decode.blocks_for(ticket.num_tokens)
    for side in decode.decodes:
        side.reserve(ticket, SIGNER.sign(ticket), ids, held_blocks)
    return ids
