"""The handoff without engines, by `bench.handoff_links` in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence

from bench.gpu.results import MIB
from bench.handoff.link_rate import LinkRate


async def agent_sends(sizes: Sequence[int]) -> list[LinkRate]:
    """From GPU 0 to GPU 1 over NCCL, so many bytes each.

    Raises RuntimeError with what the process said.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.handoff_links", "--json", "--transports", "nccl",
        "--sizes", ",".join(str(max(1, size // MIB)) for size in sizes), "--rounds", "11",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"NCCL_NVLS_ENABLE": "0"},
    )  # fmt: skip
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise RuntimeError(err[-500:].decode(errors="replace"))
    return [LinkRate(**row) for row in json.loads(out.splitlines()[-1])["rows"]]
