"""The rate of a KV handoff over gRPC on this machine, beside raw TCP and bare gRPC in the same run.

    python -m bench.handoff_cpu [--json]

Two processes, each with a handoff agent over a KV cache shaped like Llama-3.1-8B's, as engine
workers have them; no model runs, so that nothing hides the transfer. A handoff is everything from
the opened ticket to the acknowledgement: gather, checksum, transfer, checksum, scatter. Raw TCP
runs twice: the same hot buffer again and again, and from and into as much memory as the caches
have. The systems take turns within a round; numbers are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from bench.handoff.cache import BLOCK_BYTES
from bench.handoff.rates import MIB, SHAPES, GrpcRate, HandoffRate, TcpRate, Transfer
from bench.tables import table

PROBE = 256 * MIB


def best_grpc(say: Any) -> GrpcRate:
    """The fastest way to use bare gRPC here, by the median of three probes each."""
    best, best_rate = None, 0.0
    for shape in SHAPES:
        candidate = GrpcRate(shape)
        candidate.run(PROBE)
        rate = statistics.median(candidate.run(PROBE) for _ in range(3))
        say(f"bare gRPC, {shape}: {rate / 1e9:.2f} GB/s")
        if rate > best_rate:
            if best is not None:
                best.stop()
            best, best_rate = candidate, rate
        else:
            candidate.stop()
    assert best is not None
    return best


def measure(sizes: list[int], rounds: int, frame: int, say: Any) -> dict[str, Any]:
    """Rows by size."""
    grpc = best_grpc(say)
    tcp, tcp_memory = TcpRate(), TcpRate(2 * max(sizes) * MIB)
    blocks = 2 * max(sizes) * MIB // BLOCK_BYTES
    handoff = HandoffRate(blocks, ("cpu", "cpu"), "grpc", frame=frame)
    rows = []
    try:
        for mib in sizes:
            size = mib * MIB
            tcps: list[float] = []
            memories: list[float] = []
            grpcs: list[float] = []
            ours: list[Transfer] = []
            whole = size // BLOCK_BYTES * BLOCK_BYTES or BLOCK_BYTES
            for number in range(rounds + 1):
                results = (
                    tcp.run(size), tcp_memory.run(size), grpc.run(size), handoff.run(whole)
                )  # fmt: skip
                if number:  # the first round is not counted
                    tcps.append(results[0])
                    memories.append(results[1])
                    grpcs.append(results[2])
                    ours.append(results[3])
            rate = statistics.median(t.rate for t in ours)
            row = {
                "mib": mib,
                "tcp_gbps": statistics.median(tcps) / 1e9,
                "tcp_memory_gbps": statistics.median(memories) / 1e9,
                "grpc_gbps": statistics.median(grpcs) / 1e9,
                "handoff_gbps": rate / 1e9,
                "cpu_s_per_gib": statistics.median(t.cpu / t.size * (1 << 30) for t in ours),
            }
            say(
                f"{mib} MiB: {row['handoff_gbps'] / row['tcp_gbps']:.0%} of TCP,"
                f" {row['handoff_gbps'] / row['grpc_gbps']:.0%} of gRPC"
            )
            rows.append(row)
    finally:
        grpc.stop()
        tcp.stop()
        tcp_memory.stop()
        handoff.stop()
    shape = grpc.shape
    return {
        "rows": rows,
        "grpc": {
            "channels": shape.channels,
            "message_mib": shape.message / MIB,
            "frame_bytes": shape.frame or 16384,
        },
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    head = ["MiB", "TCP GB/s", "from memory", "gRPC GB/s", "handoff GB/s", "of TCP"]
    head += ["of TCP from memory", "of gRPC", "CPU s/GiB"]
    return table(
        head,
        [
            [
                str(row["mib"]),
                f"{row['tcp_gbps']:.2f}",
                f"{row['tcp_memory_gbps']:.2f}",
                f"{row['grpc_gbps']:.2f}",
                f"{row['handoff_gbps']:.2f}",
                f"{row['handoff_gbps'] / row['tcp_gbps']:.0%}",
                f"{row['handoff_gbps'] / row['tcp_memory_gbps']:.0%}",
                f"{row['handoff_gbps'] / row['grpc_gbps']:.0%}",
                f"{row['cpu_s_per_gib']:.2f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="2,16,128,512", help="MiB, comma-separated")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds per size")
    parser.add_argument(
        "--frame", type=int, default=16, help="MiB of our payloads (16, as configured by default)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    sizes = [int(size) for size in args.sizes.split(",")]
    measured = measure(sizes, args.rounds, args.frame, say)
    print(json.dumps(measured) if args.json else as_table(measured["rows"]))


if __name__ == "__main__":
    main()
