"""Handoff results on their way from the engine's worker process to the worker's front end.

vLLM carries connector statistics with every step; each result rides along once.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from cluster.kv.handoff import HandoffResult


class HandoffStats(KVConnectorStats):
    """`data["results"]` is a list of HandoffResult dicts, one per rank and handoff; the scheduler's
    half adds `ahead_bytes` and `waiting`, its credit book's view, when that has changed."""

    data: dict[str, Any]

    @classmethod
    def of(cls, results: list[HandoffResult]) -> HandoffStats:
        return cls(data={"results": [result.to_dict() for result in results]})

    def reset(self) -> None:
        self.data = {"results": []}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        results = [*self.data.get("results", ()), *other.data.get("results", ())]
        self.data = {**self.data, **other.data, "results": results}
        return self

    def reduce(self) -> dict[str, int | float]:
        results: list[dict[str, Any]] = self.data.get("results", [])
        return {
            "Handoffs": len(results),
            "Handoff bytes": sum(result["bytes"] for result in results),
            "Handoffs failed": sum(bool(result["error"]) for result in results),
        }

    def is_empty(self) -> bool:
        return not self.data.get("results") and "waiting" not in self.data
