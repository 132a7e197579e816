"""What the two halves of the connector tell each other, one engine step at a time."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from cluster.kv.reservation import Reserve
from cluster.kv.sender import Arrival, Offer, Release


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """One step's handoff work, from the scheduler's half.

    Attributes:
        allocated: blocks that the step hands out.
        kept: slots of the cache (block id times block size plus offset) that hold a prompt's last
            token from prefill. The step computes that token again, for its logits only.
        arrivals: prefill requests that have come.
        reserves: decode requests that took blocks.
        offers: prompt blocks this step completes, in prefill requests.
        preempted: prefill handoffs whose blocks this step takes back.
        sent: prefill requests the engine is done with.
        received: decode requests that have ended, by handoff id.
    """

    allocated: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    reserves: tuple[Reserve, ...] = ()
    offers: tuple[Offer, ...] = ()
    preempted: tuple[str, ...] = ()
    sent: tuple[Release, ...] = ()
    received: tuple[str, ...] = ()


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What came of it, from every rank.

    Attributes:
        granted: handoffs that decode has room for, by any rank's word.
    """

    granted: set[str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(self.granted | other.granted)
