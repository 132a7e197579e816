"""What vLLM says of itself: its scheduler after each step, and its metrics."""

from __future__ import annotations

import threading
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

from cluster.engine.results import HandoffResults
from cluster.kv.handoff import HandoffResult


class FrontEndStats:
    """The last step's view; written on the front end's event loop.

    Attributes:
        kv_usage: share of the KV pool that requests hold, 0 to 1.
        ahead_bytes: KV of prompts admitted ahead of decode's grant.
        waiting_for_credit: prompts that wait for it.
    """

    def __init__(self, results: HandoffResults) -> None:
        self.kv_usage = 0.0
        self.running = 0
        self.waiting = 0
        self.ahead_bytes = 0
        self.waiting_for_credit = 0
        self._results = results

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """A vLLM stat logger factory that feeds this view."""
        return _Tap(vllm_config, engine_index, self)

    def see(self, stats: Any) -> None:
        self.kv_usage = stats.kv_cache_usage
        self.running = stats.num_running_reqs
        self.waiting = stats.num_waiting_reqs
        connector = stats.kv_connector_stats or {}
        for part in connector.get("results", ()):
            self._results.add(HandoffResult(**part))
        self.ahead_bytes = connector.get("ahead_bytes", self.ahead_bytes)
        self.waiting_for_credit = connector.get("waiting", self.waiting_for_credit)


class _Tap(StatLoggerBase):
    def __init__(
        self, vllm_config: VllmConfig, engine_index: int = 0, view: FrontEndStats | None = None
    ) -> None:
        self._view = view

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None and self._view is not None:
            self._view.see(scheduler_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class EngineMetrics(PrometheusStatLogger):
    """vLLM's own metrics, registered by one engine of a process at a time.

    vLLM takes out of the process's registry what is there and registers its own, name by name: of
    two engines that start at the same time one would find the other's names taken, and fail.
    """

    _registering = threading.Lock()

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        with self._registering:
            super().__init__(vllm_config, engine_indexes)
