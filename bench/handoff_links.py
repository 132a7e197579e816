"""The handoff between two agents on two GPUs, without engines: NCCL beside gRPC, by size.

    python -m bench.handoff_links [--transports nccl grpc] [--sizes 2,16,128,512] [--json]

The first handoff's blocks of every size are compared on both sides. A quick look before
bench.gpu_handoff.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict

from bench.handoff.cache import BLOCK_BYTES
from bench.handoff.link_rate import LinkRate
from bench.handoff.rates import MIB, HandoffRate
from bench.tables import table


def measure(rate: HandoffRate, mib: int, rounds: int) -> LinkRate:
    """Raises RuntimeError if a handoff fails, or its blocks are not the same on both sides."""
    size = max(1, mib * MIB // BLOCK_BYTES) * BLOCK_BYTES
    runs = [rate.run(size, compare=round == 0) for round in range(rounds + 2)][2:]
    whole, moving, cpu = (
        1000 * statistics.median(times)
        for times in zip(*((run.seconds, run.moving, run.cpu) for run in runs), strict=True)
    )
    return LinkRate(runs[-1].transport, size // MIB, whole, moving, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transports", nargs="+", default=["nccl", "grpc"])
    parser.add_argument("--sizes", default="2,16,128,512", help="MiB, comma-separated")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link", type=int, help="MiB of device memory that a link takes (1024)")
    parser.add_argument(
        "--max-ctas", type=int, help="thread blocks of a transfer over NCCL (it decides)"
    )
    parser.add_argument("--frame", type=int, default=16, help="MiB of a payload over gRPC (16)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    rows = []
    for transport in args.transports:
        rate = HandoffRate(
            2 * max(sizes) * MIB // BLOCK_BYTES,
            tuple(args.devices),
            transport,
            args.link,
            args.frame,
            args.max_ctas,
        )
        for mib in sizes:
            print(f"{transport}: {mib} MiB", file=sys.stderr, flush=True)
            rows.append(measure(rate, mib, args.rounds))
        rate.stop()
    if args.json:
        return print(json.dumps({"rows": [asdict(row) for row in rows]}))
    said = [
        [row.transport, str(row.mib)]
        + [f"{v:.2f}" for v in (row.whole_ms, row.moving_ms, row.gib_per_s, row.cpu_ms)]
        for row in rows
    ]
    head = ["transport", "MiB", "ms", "from grant to landed, ms", "GiB/s", "CPU, ms"]
    print(table(head, said))


if __name__ == "__main__":
    main()
