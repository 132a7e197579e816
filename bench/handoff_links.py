"""The handoff between two agents on two GPUs, without engines: NCCL beside gRPC, by size.

    python -m bench.handoff_links [--transports nccl grpc] [--sizes 2,16,128,512]

The first handoff's blocks of every size are compared on both sides. A quick look before
bench.gpu_handoff.
"""

from __future__ import annotations

import argparse
import statistics

from bench.handoff.cache import BLOCK_BYTES
from bench.handoff.rates import MIB, HandoffRate
from bench.tables import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transports", nargs="+", default=["nccl", "grpc"])
    parser.add_argument("--sizes", default="2,16,128,512", help="MiB, comma-separated")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link", type=int, help="MiB of device memory that a link takes (256)")
    parser.add_argument(
        "--max-ctas", type=int, help="thread blocks of a transfer over NCCL (it decides)"
    )
    parser.add_argument("--frame", type=int, default=16, help="MiB of a payload over gRPC (16)")
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
            blocks = max(1, mib * MIB // BLOCK_BYTES)
            runs = [
                rate.run(blocks * BLOCK_BYTES, compare=round == 0)
                for round in range(args.rounds + 2)
            ][2:]
            seconds = statistics.median(run.seconds for run in runs)
            moving = statistics.median(run.moving for run in runs)
            size = blocks * BLOCK_BYTES
            rows.append(
                [
                    runs[-1].transport,
                    str(mib),
                    f"{seconds * 1e3:.2f}",
                    f"{moving * 1e3:.2f}",
                    f"{size / moving / 2**30:.1f}",
                ]
            )
            print(rows[-1], flush=True)
        rate.stop()
    print(table(["transport", "MiB", "ms", "from grant to landed, ms", "GiB/s"], rows))


if __name__ == "__main__":
    main()
