"""The link by itself: `python -m bench.gpu.raw RANK PORT BYTES…`, a process per GPU.

Rank 0 sends and prints a JSON list of median seconds, each from the call to the stream's end.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from datetime import timedelta
from statistics import median

RUNS = 12
WARM_UPS = 3
WAIT_SECONDS = 90


async def raw_sends(sizes: list[int]) -> list[float]:
    """Median seconds of an NCCL send of each size from GPU 0 to GPU 1, in bytes.

    Raises RuntimeError with what the processes said, TimeoutError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.gpu.raw", str(rank), str(port), *map(str, sizes),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(rank), "NCCL_NVLS_ENABLE": "0"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            said = await asyncio.gather(*(process.communicate() for process in pair))
    finally:
        for process in pair:
            if process.returncode is None:
                process.kill()
    if any(process.returncode for process in pair):
        raise RuntimeError(b"\n".join(err[-500:] for _, err in said).decode(errors="replace"))
    seconds: list[float] = json.loads(said[0][0].splitlines()[-1])
    return seconds


def main(rank: int, port: int, sizes: list[int]) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=WAIT_SECONDS), device_id=torch.device("cuda:0"),
    )  # fmt: skip
    ready = torch.zeros(1, device="cuda")
    medians = []
    for size in sizes:
        payload = torch.zeros(size, dtype=torch.uint8, device="cuda")
        seconds = []
        for _ in range(WARM_UPS + RUNS):
            dist.all_reduce(ready)
            torch.cuda.synchronize()
            began = time.perf_counter()
            if rank == 0:
                dist.send(payload, 1)
            else:
                dist.recv(payload, 0)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        medians.append(median(seconds[WARM_UPS:]))
    if rank == 0:
        print(json.dumps(medians), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [int(size) for size in sys.argv[3:]])
