"""Methods the front end calls inside each engine worker process, by vLLM's collective_rpc."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any

import psutil
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cluster.kv.connector import PdserveConnector
from cluster.kv.connector.worker import WorkerSide


class PdserveWorkerExtension:
    """Mixed into vLLM's worker class through `worker_extension_cls`."""

    def pdserve_endpoint(self) -> dict[str, Any]:
        """Where this rank takes handoffs, and its KV layout."""
        side = handoff_side()
        assert side.agent is not None and side.layout is not None
        return {
            "address": side.agent.address,
            "transport": side.agent.transport_name,
            "layout": side.layout.fingerprint(),
            "geometry": side.layout.geometry.encode(),
            "block_size": side.layout.geometry.tokens,
        }

    def pdserve_holdings(self) -> dict[str, Any]:
        """What this rank pins now, checked for integrity, and its resident memory in bytes."""
        side = handoff_side()
        assert side.agent is not None
        now = time.monotonic()
        pins = side.agent.pins()
        entries = [
            {**asdict(entry), "lease_left": entry.lease_expires - now} for entry in pins.entries
        ]
        rss = psutil.Process(os.getpid()).memory_info().rss
        return {
            "ledger": entries,
            "leaked_blocks": pins.leaked_blocks,
            "pid": os.getpid(),
            "resident_bytes": rss,
        }


def handoff_side() -> WorkerSide:
    """The connector's half in this process."""
    connector = get_kv_transfer_group()
    assert isinstance(connector, PdserveConnector) and connector.worker is not None
    return connector.worker
