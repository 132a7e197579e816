"""A worker's performance from data sheets alone: the start that a profile replaces.

Linear layers take the larger of reading the weights and of computing; attention over the decode
batch's KV is always bound by memory (Williams et al., Roofline, 2009; DistServe §A).
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.planner.hardware import Hardware
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost
from cluster.planner.shape import ModelShape


@dataclass(frozen=True)
class Efficiency:
    """How much of the data sheet engines reach, and what a step costs besides.

    The defaults are vLLM 0.32's on one H200 with Llama-3.1-8B, rounded to what it reaches at large
    sizes; small ones are worse, which calibration finds.

    Attributes:
        flops, bandwidth: shares of the peaks.
        step_overhead, sequence_overhead: seconds per step, and per sequence in a decode step.
        memory: share of the GPU's memory that holds weights and KV.
        handoff_latency: seconds that no overlap hides.
    """

    flops: float = 0.55
    bandwidth: float = 0.8
    step_overhead: float = 0.0008
    sequence_overhead: float = 15e-6
    memory: float = 0.9
    handoff_latency: float = 0.002


def roofline(
    shape: ModelShape,
    hardware: Hardware,
    tensor_parallel: int = 1,
    efficiency: Efficiency | None = None,
) -> Performance:
    """The performance of one worker of `tensor_parallel` GPUs.

    Raises:
        InvalidRequest: the weights do not fit.
    """
    reached = efficiency or Efficiency()
    flops = hardware.flops * tensor_parallel * reached.flops
    bandwidth = hardware.bandwidth * tensor_parallel * reached.bandwidth
    room = hardware.memory * tensor_parallel * reached.memory - shape.weight_bytes
    if room < shape.kv_bytes_per_token * 1024:
        need = shape.weight_bytes / (hardware.memory * reached.memory)
        raise InvalidRequest(
            "gpu",
            f"{shape.name} does not fit into {tensor_parallel} × {hardware.name}: its weights "
            f"alone take {need:.1f} of them; raise --tensor-parallel",
        )
    weights = shape.weight_bytes / bandwidth
    per_token = 2.0 * shape.layer_parameters / flops
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim / flops
    per_context = shape.kv_bytes_per_token / bandwidth
    compute_bound_from = max(1, round(weights / per_token))
    overhead = reached.step_overhead
    return Performance(
        prefill=PrefillCost(overhead, per_token, attention, overhead + weights),
        decode=DecodeCost(overhead + weights, per_context, reached.sequence_overhead),
        decode_large=DecodeCost(overhead, per_context, per_token + reached.sequence_overhead),
        large_batch=compute_bound_from,
        handoff=HandoffCost(reached.handoff_latency, hardware.link_bandwidth, shape.layers),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        kv_capacity=int(room / shape.kv_bytes_per_token),
        gpus=tensor_parallel,
        label=f"{shape.name} on {tensor_parallel} × {hardware.name}, roofline",
    )
