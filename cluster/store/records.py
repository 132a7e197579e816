"""What the store holds of the cluster: plain records, JSON on the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

WorkerState = Literal["starting", "ready", "draining", "failed"]


def known_fields(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that the dataclass `kind` has. Versions meet while a cluster is renewed,
    and what a later one has added is no reason for an earlier one to end."""
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}


@dataclass(frozen=True)
class WorkerRecord:
    """One life of one worker, renewed under a lease.

    Attributes:
        role: prefill, decode or both: what the router may send it.
        epoch: grows with every change of role within a life.
        address: host:port of its Worker service.
        transfer_addresses: host:port of each engine rank's KvTransfer service.
        transport: how it takes KV, such as grpc.
        layout: fingerprint of its KV; blocks move between workers with equal ones.
        geometry: how it cuts its KV cache into ranks and blocks.
        block_size: tokens per KV block.
        num_blocks: blocks of its KV pool.
        plans_ahead, graph_tokens: as of `EngineInfo`.
        metrics_address: host:port of its Prometheus endpoint.
        detail: what it waits for, or why it failed.
    """

    worker_id: str
    incarnation: str
    model: str
    role: str
    state: WorkerState
    epoch: int = 0
    address: str = ""
    transfer_addresses: tuple[str, ...] = ()
    transport: str = ""
    layout: str = ""
    geometry: str = ""
    block_size: int = 0
    num_blocks: int = 0
    max_model_len: int = 0
    vocab_size: int = 0
    plans_ahead: bool = False
    graph_tokens: int = 0
    metrics_address: str = ""
    host: str = ""
    pid: int = 0
    started_at: float = 0.0
    detail: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str | bytes) -> WorkerRecord:
        values = known_fields(cls, json.loads(raw))
        record = cls(**values)
        return replace(record, transfer_addresses=tuple(values.get("transfer_addresses", ())))


@dataclass(frozen=True)
class RouterRecord:
    """One life of one router, renewed under a lease. Addresses are host:port."""

    router_id: str
    incarnation: str
    grpc_address: str
    http_address: str
    operator_address: str = ""
    state: WorkerState = "ready"
    host: str = ""
    pid: int = 0
    started_at: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str | bytes) -> RouterRecord:
        return cls(**known_fields(cls, json.loads(raw)))


@dataclass(frozen=True)
class JournalEntry:
    """One request in the journal: who asked, what became of it. No prompt and no text."""

    request_id: str
    model: str
    state: str
    router_id: str
    prompt_tokens: int
    completion_tokens: int = 0
    received_at: float = 0.0
    updated_at: float = 0.0
    error: str = ""
    tenant: str = "default"
    phases: dict[str, float] = field(default_factory=dict)
    slo_class: str = ""

    def to_json(self) -> str:
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str | bytes) -> JournalEntry:
        return cls(**known_fields(cls, json.loads(raw)))
