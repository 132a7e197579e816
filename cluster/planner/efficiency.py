"""How well a worker is used, and what a request costs."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.hardware import Hardware
from cluster.planner.shape import ModelShape


def prefill_mfu(
    shape: ModelShape, hardware: Hardware, gpus: int, new: int, cached: int, seconds: float
) -> float:
    """Model FLOP utilisation: achieved FLOP/s ÷ peak dense."""
    return shape.prefill_flops(new, cached) / seconds / (hardware.flops * gpus)


def decode_mbu(
    shape: ModelShape, hardware: Hardware, gpus: int, context: int, seconds: float
) -> float:
    """Model bandwidth utilisation: (weights + KV bytes read per step) ÷ step time ÷ peak."""
    return shape.decode_bytes(context) / seconds / (hardware.bandwidth * gpus)


def tokens_per_second_per_user(tpot_seconds: float) -> float:
    """What one reader sees; 0 where there is no TPOT."""
    return 1.0 / tpot_seconds if tpot_seconds > 0 else 0.0


@dataclass(frozen=True)
class Cost:
    """Dollars per request, by the pool that earns them."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def cost_per_request(
    dollars_per_gpu_hour: float, prefill_gpus: float, decode_gpus: float, goodput: float
) -> Cost:
    """$/GPU-hour × GPUs ÷ (3600 × goodput). Workers of both roles: split their GPUs by busy time.

    Args:
        goodput: requests/s that meet their targets; with none the cost is infinite.
    """
    if goodput <= 0:
        return Cost(float("inf"), float("inf"))
    each = dollars_per_gpu_hour / (3600.0 * goodput)
    return Cost(each * prefill_gpus, each * decode_gpus)
