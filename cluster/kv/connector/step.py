"""What the two halves of the connector tell each other, one engine step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        arrivals: prefill requests that have come.
        reserves: decode requests that took blocks.
        offers: prompt blocks this step completes, in prefill requests.
        preempted: prefill handoffs whose blocks this step takes back.
        sent: prefill requests the engine is done with.
        received: decode requests that have ended, by handoff id.
    """

    allocated: tuple[int, ...] = ()
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
        first_tokens: of decode requests that have landed on some rank.
    """

    granted: set[str] = field(default_factory=set)
    first_tokens: dict[str, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(self.granted | other.granted, self.first_tokens | other.first_tokens)
