"""The handoff on GPUs: one session, one table.

For a machine with two or four Hopper GPUs. It needs Python 3.12, PyTorch for CUDA and vLLM 0.32
with what that needs, on PYTHONPATH if not installed; it reaches no network and changes no GPU's
settings. The project runs from its source tree, and the protocol's code must be in it: where the
machine has no registry, generate it elsewhere (`make setup` does) and bring the *_pb2*.py files
beside proto/pdserve/v1/*.proto along with the tree. Then, from the repository's root:

    PYTHONPATH=/tmp/site:proto python3 -m bench.gpu_handoff --out results

Every engine is a process of its own with cards of its own; weights are made up
(bench/gpu/weights.py). Results are written to --out after every section, so that what was measured
stays when the time is over. With --device cpu everything but NCCL and NIXL runs on a CPU with a
tiny model: that shows that the bench works, and measures nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import models
from bench.gpu.machine import cards, packages
from bench.gpu.plan import Setting
from bench.gpu.report import report
from bench.gpu.results import Results
from bench.gpu.session import SECTIONS, Load, Session

SYSTEMS = ("nccl", "grpc", "one", "nixl")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_handoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"of {' '.join(SECTIONS)} (default: all)")  # fmt: skip
    add("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM",
        help=f"of {' '.join(SYSTEMS)} (default: all; on the CPU grpc and one)")  # fmt: skip
    add("--prompts", type=int, nargs="+", metavar="TOKENS",
        help="prompt lengths (default 512 to 16384; on the CPU 64 256 512)")  # fmt: skip
    add("--runs", type=int, default=5, help="per prompt length and system, after two (5)")
    add("--chunk", type=int, default=8192, help="tokens per engine step (8192)")
    add("--minutes", type=float, default=8.0, help="after which nothing new begins (8)")
    add("--eager", action="store_true", help="no compilation, no CUDA graphs: starts sooner")
    add("--no-tp", action="store_true", help="no prefill over two cards, even where there are four")
    add("--share-cards", action="store_true",
        help="on two cards, also a prefill over both, beside the others, over gRPC")  # fmt: skip
    add("--max-ctas", type=int, metavar="BLOCKS",
        help="thread blocks that a transfer over NCCL may take (NCCL decides)")  # fmt: skip
    add("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-handoff")), metavar="FOLDER",
        help="gets results.json, table.md and the logs ($OUT, or gpu-handoff)")  # fmt: skip
    add("--json", action="store_true", help="print the results as JSON, not as tables")
    chosen = parser.parse_args(given)
    if chosen.runs < 1:
        parser.error("--runs must be at least 1")
    if chosen.prompts and min(chosen.prompts) < 2:
        parser.error("--prompts must be at least 2")
    return chosen


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def settings(chosen: argparse.Namespace, folder: Path, gpus: list[float]) -> tuple[Setting, Load]:
    """What to start and what to ask of it."""
    cpu = chosen.device == "cpu"
    config = models.TINY if cpu else models.LLAMA_3_1_8B
    prompts = tuple(chosen.prompts or ([64, 256, 512] if cpu else [1 << n for n in range(9, 15)]))
    load = Load(
        prompts=prompts,
        runs=chosen.runs,
        output=8,
        exact_prompts=(64, 300) if cpu else (33, 1500, 4096, 10000),
        batch=4 if cpu else 64,
        batch_context=128 if cpu else 1024,
        batch_tokens=2000 if cpu else 640,
        inbound=256 if cpu else 4096,
        rounds=3 if cpu else 5,
        span_seconds=0.3,
        vocab=config["vocab_size"],
        kv_bytes_per_token=models.kv_bytes_per_token(config),
    )
    longest = max(*prompts, *load.exact_prompts, load.batch_context + load.batch_tokens)
    setting = Setting(
        path=str(models.write(config, folder)),
        dtype=config["dtype"],
        secret=secrets.token_bytes(32),
        max_model_len=longest + 32,
        chunk=min(chosen.chunk, 256) if cpu else chosen.chunk,
        gpus=tuple(gpus),
        systems=tuple(chosen.systems or (("grpc", "one") if cpu else SYSTEMS)),
        eager=chosen.eager or cpu,
        share_cards=chosen.share_cards,
        tensor_parallel=not chosen.no_tp,
        prefill_kv_gib=0.125 if cpu else 6.0,
        decode_kv_gib=0.125 if cpu else 14.0,
        start_seconds=450.0 if cpu else 240.0,
        max_ctas=chosen.max_ctas,
    )
    return setting, load


def about(chosen: argparse.Namespace, found: list[tuple[str, float]]) -> dict[str, str]:
    machine = f"{len(found)} × {found[0][0]}" if found else platform.processor() or "CPU"
    model = "a tiny Llama, float32" if chosen.device == "cpu" else "Llama-3.1-8B, bfloat16"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "software": packages(),
        "model": f"{model}, made-up weights",
        "command": "python3 -m bench.gpu_handoff " + " ".join(sys.argv[1:]),
        "runs": f"medians of {chosen.runs} after 2 that are not counted",
    }


def main() -> None:
    chosen = arguments()
    ends = time.monotonic() + 60 * chosen.minutes
    found = [] if chosen.device == "cpu" else cards()
    if chosen.device == "cuda" and len(found) < 2:
        sys.exit(f"two GPUs are needed and {len(found)} found; --device cpu tries the bench itself")
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    results = Results(about=about(chosen, found))

    def save() -> None:
        (out / "results.json").write_text(json.dumps(results.to_dict(), indent=2))
        (out / "table.md").write_text(report(results))

    with tempfile.TemporaryDirectory(prefix="pds-gpu-") as folder:
        setting, load = settings(chosen, Path(folder) / "model", [gib for _, gib in found])
        (out / "logs").mkdir(exist_ok=True)
        session = Session(
            setting, load, chosen.only, out / "logs", Path(folder), ends, results, save, say
        )
        asyncio.run(session.run())
    save()
    print(json.dumps(results.to_dict(), indent=2) if chosen.json else report(results))


if __name__ == "__main__":
    main()
