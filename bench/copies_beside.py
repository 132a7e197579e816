"""What copies to another GPU cost the multiplications beside them, by size and spread.

    python -m bench.copies_beside [--rounds 5] [--json]

Two GPUs that reach each other's memory. A row of multiplications as large as a prompt's – 8,192
tokens, 4,096 × 14,336 weights in bfloat16 – is timed on the first one's own clock, by itself and
with copies queued behind some of them on another stream; the rows take turns. It is why links send
in bursts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from bench.tables import table
from cluster.kv.transport.nccl_library import driver

MIB = 1 << 20
MULTIPLICATIONS = 240
BUFFER = 256 * MIB
PIECE = 64 * MIB


@dataclass(frozen=True)
class Spread:
    """How copies lie among the multiplications.

    Attributes:
        every: one behind every so many of them; 0: none.
        size: bytes of each.
        where: peer, host or the same card.
    """

    every: int = 0
    size: int = 0
    where: str = "peer"

    @property
    def name(self) -> str:
        if not self.every:
            return "nothing"
        count = -(-MULTIPLICATIONS // self.every)
        return f"{count} × {self.size // MIB} MiB to the {self.where}"


SPREADS = (
    Spread(),
    Spread(8, 64 * MIB),
    Spread(8, 1 * MIB),
    Spread(1, 8 * MIB),
    Spread(64, 512 * MIB),
    Spread(MULTIPLICATIONS, 2048 * MIB),
    Spread(8, 64 * MIB, "host"),
    Spread(8, 64 * MIB, "same card"),
)


@dataclass(frozen=True)
class Cost:
    """Milliseconds, the median of all rounds.

    Attributes:
        more: than by themselves.
    """

    beside: str
    milliseconds: float
    more: float


def measure(rounds: int) -> list[Cost]:
    """Raises RuntimeError where there are no two GPUs that reach each other."""
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        raise RuntimeError("two GPUs that reach each other's memory are needed")
    here = torch.device("cuda:0")
    torch.cuda.set_device(here)
    tokens = torch.randn(8192, 4096, device=here, dtype=torch.bfloat16)
    weights = torch.randn(4096, 14336, device=here, dtype=torch.bfloat16)
    source = torch.empty(BUFFER, dtype=torch.uint8, device=here)
    targets = {
        "peer": torch.empty(BUFFER, dtype=torch.uint8, device="cuda:1"),
        "host": torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True),
        "same card": torch.empty(BUFFER, dtype=torch.uint8, device=here),
    }
    targets["peer"].copy_(source)  # has torch map the peer's memory
    stream = torch.cuda.Stream(here, priority=-1)

    def copy(spread: Spread) -> None:
        for start in range(0, spread.size, PIECE):
            at, size = start % BUFFER, min(PIECE, spread.size - start)
            address = targets[spread.where].data_ptr() + at
            failed = driver().cuMemcpyAsync(
                ctypes.c_uint64(address),
                ctypes.c_uint64(source.data_ptr() + at),
                ctypes.c_size_t(size),
                ctypes.c_void_p(stream.cuda_stream),
            )
            if failed:
                raise RuntimeError(f"the driver copies nothing: error {failed}")

    def run(spread: Spread) -> float:
        return _timed(lambda: torch.mm(tokens, weights), stream, spread, copy)

    for spread in SPREADS:
        run(spread)
    taken: dict[str, list[float]] = {spread.name: [] for spread in SPREADS}
    for _ in range(rounds):
        for spread in SPREADS:
            taken[spread.name].append(run(spread))
            time.sleep(0.05)
    alone = statistics.median(taken[SPREADS[0].name])
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return [Cost(name, found, found - alone) for name, found in medians.items()]


def _timed(
    multiply: Callable[[], object], stream: torch.cuda.Stream, spread: Spread,
    copy: Callable[[Spread], None],
) -> float:  # fmt: skip
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for card in range(2):
        torch.cuda.synchronize(card)
    began.record()
    for number in range(MULTIPLICATIONS):
        multiply()
        if spread.every and number % spread.every == 0:
            stream.wait_stream(torch.cuda.current_stream())
            copy(spread)
    ended.record()
    for card in range(2):
        torch.cuda.synchronize(card)
    return float(began.elapsed_time(ended))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        costs = measure(args.rounds)
    except RuntimeError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps({"rows": [asdict(cost) for cost in costs]}))
        return
    rows = [[c.beside, f"{c.milliseconds:.1f}", f"{c.more:+.1f}"] for c in costs]
    print(table(["beside", f"{MULTIPLICATIONS} multiplications, ms", "more"], rows))


if __name__ == "__main__":
    main()
