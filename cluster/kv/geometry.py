"""Who sends which KV heads to whom, when the two sides of a handoff are cut differently.

Pure. Tensor parallelism gives each rank a run of the model's KV heads – or, where there are more
ranks than heads, the same head to several. A **route** is one prefill rank's share of what one
decode rank needs; together the routes of a decode rank cover each of its heads exactly once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cluster.errors import HandoffRefused

PLAIN = "plain"
"""A block is `[heads, tokens, content]`, one token's K and V after the other's."""

OPAQUE = "opaque-"
"""Begins the name of an order that is not known: such blocks move only as they are."""

MAX_RANKS = 64
MAX_BLOCK_TOKENS = 1 << 16


@dataclass(frozen=True)
class HeadRun:
    """Heads `start` to `stop` of a rank's own, the last excluded."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Route:
    """One stream of a handoff: `source` of the prefill rank's heads fill `target` of decode's."""

    prefill_rank: int
    decode_rank: int
    source: HeadRun
    target: HeadRun


@dataclass(frozen=True)
class KvGeometry:
    """How one engine cuts its KV cache.

    Attributes:
        ranks: tensor-parallel size, a power of two.
        heads: KV heads of the model over all ranks; 1 for multi-head latent attention.
        tokens: per block.
        packing: how a block's bytes lie: `PLAIN`, or the name of an attention kernel's own order.
    """

    ranks: int
    heads: int
    tokens: int
    packing: str = PLAIN

    def heads_of(self, rank: int) -> HeadRun:
        """The model's heads that a rank holds, as vLLM deals them out."""
        if self.heads >= self.ranks:
            each = self.heads // self.ranks
            return HeadRun(rank * each, (rank + 1) * each)
        head = rank * self.heads // self.ranks
        return HeadRun(head, head + 1)

    @property
    def opaque(self) -> bool:
        return self.packing.startswith(OPAQUE)

    def encode(self) -> str:
        """One word, as tickets and records carry it."""
        return f"{self.ranks}x{self.heads}x{self.tokens}x{self.packing}"

    @classmethod
    def parse(cls, text: str) -> KvGeometry:
        """Raises HandoffRefused for what no engine can be."""
        parts = text.split("x", 3)
        try:
            geometry = cls(int(parts[0]), int(parts[1]), int(parts[2]), parts[3])
        except (ValueError, IndexError):
            raise HandoffRefused(f"a KV geometry is malformed: {text[:40]!r}") from None
        if not (
            1 <= geometry.ranks <= MAX_RANKS
            and geometry.ranks & (geometry.ranks - 1) == 0
            and 1 <= geometry.heads <= 1 << 12
            and 1 <= geometry.tokens <= MAX_BLOCK_TOKENS
        ):
            raise HandoffRefused(f"a KV geometry is impossible: {asdict(geometry)}")
        return geometry


def same_blocks(prefill: KvGeometry, decode: KvGeometry) -> bool:
    """A block of one side has the other's tokens in the other's order: its bytes move as they are.
    Otherwise they cross in plain order and are laid out anew."""
    return prefill.tokens == decode.tokens and prefill.packing == decode.packing


def routes(prefill: KvGeometry, decode: KvGeometry) -> tuple[Route, ...]:
    """Every stream of a handoff between two engines of one model.

    A head that several prefill ranks hold is taken from one of them, spread over decode's ranks.

    Raises:
        HandoffRefused: the two do not have the same heads, or blocks that cannot be laid out anew.
    """
    if prefill.heads != decode.heads:
        raise HandoffRefused(f"{prefill.heads} KV heads on prefill, {decode.heads} on decode")
    if not same_blocks(prefill, decode) and (prefill.opaque or decode.opaque):
        raise HandoffRefused(
            f"blocks of {prefill.tokens} tokens, {prefill.packing}, cannot become blocks of"
            f" {decode.tokens}, {decode.packing}: give both sides one block_size and cache dtype"
        )
    found = []
    for decode_rank in range(decode.ranks):
        wanted = decode.heads_of(decode_rank)
        head = wanted.start
        while head < wanted.stop:
            holders = [r for r in range(prefill.ranks) if _holds(prefill, r, head)]
            prefill_rank = holders[decode_rank % len(holders)]
            held = prefill.heads_of(prefill_rank)
            stop = min(wanted.stop, held.stop)
            found.append(
                Route(
                    prefill_rank,
                    decode_rank,
                    HeadRun(head - held.start, stop - held.start),
                    HeadRun(head - wanted.start, stop - wanted.start),
                )
            )
            head = stop
    return tuple(found)


def _holds(geometry: KvGeometry, rank: int, head: int) -> bool:
    run = geometry.heads_of(rank)
    return run.start <= head < run.stop
