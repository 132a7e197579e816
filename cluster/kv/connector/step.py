"""What the scheduler's half of the connector tells the worker's half for one engine step."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from cluster.kv.receiver import Reserve
from cluster.kv.sender import Offer, Release


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """One step's handoff work.

    Attributes:
        reserves: decode requests that took blocks.
        offers: prompt blocks this step completes, in prefill requests.
        preempted: prefill handoffs whose blocks this step takes back.
        sent: prefill requests the engine is done with.
        received: decode requests that have ended, by handoff id.
    """

    reserves: tuple[Reserve, ...] = ()
    offers: tuple[Offer, ...] = ()
    preempted: tuple[str, ...] = ()
    sent: tuple[Release, ...] = ()
    received: tuple[str, ...] = ()
