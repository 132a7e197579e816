"""The hardware table: what a GPU can do at best, by its data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequest


@dataclass(frozen=True)
class Hardware:
    """One GPU, or one CPU host.

    Attributes:
        flops: peak dense FLOP/s at the model's dtype (bf16 on GPUs, fp32 on CPUs).
        bandwidth: peak memory bytes/s.
        memory: bytes.
        link_bandwidth: bytes/s to another worker of the same host, one direction, as measured or
            as a cautious share of the data sheet's.
        dollars_per_hour: list price on demand; a default that `--price` overrides.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link_bandwidth: float
    dollars_per_hour: float


_GIB = 1 << 30

HARDWARE: dict[str, Hardware] = {
    h.name: h
    for h in (
        Hardware("A100", 312e12, 2.04e12, 80 * _GIB, 200e9, 2.0),
        Hardware("H100", 989e12, 3.35e12, 80 * _GIB, 300e9, 3.0),
        Hardware("H200", 989e12, 4.8e12, 141 * _GIB, 300e9, 3.5),
        Hardware("B200", 2250e12, 7.7e12, 180 * _GIB, 600e9, 5.5),
        Hardware("L40S", 362e12, 0.86e12, 48 * _GIB, 20e9, 1.0),
        Hardware("CPU", 0.1e12, 20e9, 4 * _GIB, 1e9, 0.1),
    )
}


def hardware(name: str) -> Hardware:
    """The hardware called `name`, in any case. Raises InvalidRequest that lists the known ones."""
    found = HARDWARE.get(name.upper())
    if found is None:
        known = ", ".join(HARDWARE)
        raise InvalidRequest("gpu", f"{name!r} is not in the hardware table; known: {known}")
    return found
