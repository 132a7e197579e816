"""The KV connector vLLM loads: a facade over a scheduler's half and a worker's half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cluster.kv.connector.scheduler import SchedulerSide
from cluster.kv.connector.stats import HandoffStats
from cluster.kv.connector.step import StepMetadata, StepReport
from cluster.kv.connector.worker import ConnectorConfig, WorkerSide
from cluster.kv.credit import CreditBook

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class PdserveConnector(KVConnectorBase_V1):
    """Pushes KV from prefill to decode while it is computed.

    Every engine opens it with `kv_role="kv_both"`; what a request does is in its own parameters.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                f"pdserve cannot hand off this model yet: it has {len(groups)} KV cache groups"
                " (layers of different kinds), and one is supported"
            )
        self._scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        config = ConnectorConfig(**self._kv_transfer_config.kv_connector_extra_config)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = _scheduler_side(config, vllm_config, kv_cache_config)
        else:
            self.worker = WorkerSide(config, vllm_config, _kept(kv_cache_config))

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a preempted prefill's handoff is called off here, so nothing it says in flight can
        hand stale blocks off, and a preempted decode must not lose a token it has drawn."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """False: prefill steps run piecewise by vLLM's default, and announce each layer; decode
        steps keep their full graphs. What a full graph computes unannounced is offered at the end
        of the step."""
        return False

    # ---- the worker's half -------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._worker.begin_step(connector_metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._worker.end_step()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: peers push, and reservations were made when the step's metadata came."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled only after all of its KV has landed."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        self._worker.layer_written(layer_name)

    def wait_for_save(self) -> None:
        """Offered blocks stay pinned until they have been read: only a sliding window's are waited
        for."""
        self._worker.step_written()

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._worker.take_report()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        finished = self._worker.take_finished()
        return KVConnectorTransferResults(
            finished_sending=finished.sending,
            finished_recving=finished.recving,
            failed_recving=finished.failed,
        )

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.worker is None:
            return self._sched.stats()
        results = self.worker.take_results()
        return HandoffStats.of(results) if results else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return HandoffStats(data=data or {"results": []})

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.stop()

    # ---- the scheduler's half ----------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._sched.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self._sched.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._sched.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._sched.after_alloc(request, blocks, num_external_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if not isinstance(report, StepReport):
            report = StepReport()
        self._sched.after_step(report, connector_output.finished_sending or ())

    @property
    def may_run_ahead(self) -> Callable[[int], bool]:
        """Of so many blocks: whether the engine has room for a prompt that is not granted."""
        return self._sched.may_run_ahead

    @may_run_ahead.setter
    def may_run_ahead(self, judge: Callable[[int], bool]) -> None:
        self._sched.may_run_ahead = judge

    def first_token(self, request_id: str) -> int:
        """Of a decode request that has landed."""
        return self._sched.first_token(request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._sched.build(scheduler_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._sched.request_finished(request), None

    @property
    def _sched(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on the worker's half"
        return self._scheduler

    @property
    def _worker(self) -> WorkerSide:
        assert self.worker is not None, "called on the scheduler's half"
        return self.worker


def _scheduler_side(
    config: ConnectorConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> SchedulerSide:
    """Prompts ahead of their grants may take what the pool has beyond one longest prompt: that one
    always finds room, so that a granted prompt is never kept from running. None may run ahead whose
    blocks do not stay until they can be sent."""
    block_size = vllm_config.cache_config.block_size
    group = kv_cache_config.kv_cache_groups[0]
    block_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    longest = -(-vllm_config.model_config.max_model_len // block_size)
    spare = max(0, kv_cache_config.num_blocks - 1 - longest) * block_bytes
    ahead = min(config.max_ahead_bytes, spare) if _kept(kv_cache_config) else 0
    return SchedulerSide(block_size, block_bytes, CreditBook(ahead))


def _kept(kv_cache_config: KVCacheConfig) -> bool:
    """The engine keeps a prompt's blocks until its handoff has ended; see `PagedCache`."""
    return isinstance(kv_cache_config.kv_cache_groups[0].kv_cache_spec, FullAttentionSpec)
