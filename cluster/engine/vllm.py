"""The real engine: vLLM's AsyncLLM with pdserve's KV connector."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import psutil
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.config import HandoffConfig, ModelConfig
from cluster.engine.blocks import HeldBlocks
from cluster.engine.kv_events import KvEvents
from cluster.engine.planning import graph_tokens, plans_ahead
from cluster.engine.protocol import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    Holdings,
    Logprob,
    PinnedKv,
    TokenLogprobs,
)
from cluster.engine.results import HandoffResults
from cluster.engine.sampling import to_vllm
from cluster.engine.shown_secret import shown
from cluster.engine.stats import EngineMetrics, FrontEndStats
from cluster.errors import EngineFailed, InvalidRequest, PdserveError
from cluster.kv.handoff import HandoffResult
from cluster.kv.layout import model_digest

log = logging.getLogger(__name__)

_FINISH = {"stop": "stop", "length": "length", "abort": "cancelled", "error": "error"}
DEATH_POLL_SECONDS = 0.5
CPU_CACHE_BYTES = 1 << 30
"""vLLM's own default is a share of all memory: two engines of one host could not start."""
ENGINE_CORE = "EngineCore"
"""What vLLM names the core's process; the title that `ps` shows is not always set."""


class VllmEngine:
    """One vLLM engine.

    Args:
        worker_id, incarnation: whose tickets the engine's transfer ports accept.
        host: interface of the transfer ports.
        threads: CPU threads per engine, for engines without a GPU.
    """

    def __init__(
        self,
        model: ModelConfig,
        handoff: HandoffConfig,
        worker_id: str,
        incarnation: str,
        secret: bytes,
        host: str,
        threads: int,
    ) -> None:
        self._model = model
        self._handoff = handoff
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._host = host
        self._threads = threads
        self._results = HandoffResults(model.tensor_parallel_size)
        self._stats = FrontEndStats(self._results)
        self._llm: AsyncLLM | None = None
        self._num_blocks = 0
        self.held_blocks = HeldBlocks()
        self._kv_events = KvEvents(self.held_blocks)

    async def start(self) -> EngineInfo:
        if current_platform.is_cpu():
            os.environ["OMP_NUM_THREADS"] = str(self._threads)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        else:
            # Going on behind first tokens and the per-layer hooks are written for the V1 runner.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        try:
            self._kv_events.start()
            with shown(self._secret):
                self._llm = await asyncio.to_thread(self._open)
                ranks = await self.ask_ranks("pdserve_endpoint")
        except Exception as error:
            self._kv_events.stop()  # one that failed is not stopped, and is tried again and again
            raise EngineFailed(
                f"the engine of {self._model.name} did not start: {error}"
            ) from error
        config = self._running.vllm_config
        self._num_blocks = config.cache_config.num_gpu_blocks or 0
        return EngineInfo(
            transfer_addresses=tuple(rank["address"] for rank in ranks),
            transport=ranks[0]["transport"],
            layout=ranks[0]["layout"],
            geometry=ranks[0]["geometry"],
            block_size=ranks[0]["block_size"],
            num_blocks=self._num_blocks,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            plans_ahead=plans_ahead(config),
            graph_tokens=graph_tokens(config),
        )

    def _open(self) -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            self._engine_args(),
            stat_loggers=[self._stats.logger, EngineMetrics],
            start_engine_loop=False,
        )

    def _engine_args(self) -> AsyncEngineArgs:
        model = self._model
        digest = model_digest(model.path, model.revision, model.engine_args.get("quantization"))
        cache_bytes = CPU_CACHE_BYTES if current_platform.is_cpu() else None
        chosen: dict[str, Any] = {
            "model": model.path,
            "revision": model.revision,
            "dtype": model.dtype,
            "max_model_len": model.max_model_len,
            "block_size": model.block_size,
            "max_num_batched_tokens": model.max_num_batched_tokens,
            "max_num_seqs": model.max_num_seqs,
            "tensor_parallel_size": model.tensor_parallel_size,
            "enforce_eager": model.enforce_eager,
            "trust_remote_code": model.trust_remote_code,
            "kv_cache_memory_bytes": model.kv_cache_bytes or cache_bytes,
            "enable_prefix_caching": True,
            "disable_hybrid_kv_cache_manager": True,
            "enable_log_requests": False,
            "kv_events_config": self._kv_events.config,
            # One backend for every guide: vLLM keeps the first one it was asked for, and xgrammar
            # takes regular expressions whose every token then costs seconds.
            "structured_outputs_config": {"backend": "guidance"},
            **_processes(model.tensor_parallel_size),
            "scheduler_cls": "cluster.kv.connector.landings.make_scheduler",
            "worker_extension_cls": "cluster.kv.worker_extension.PdserveWorkerExtension",
            "kv_transfer_config": KVTransferConfig(
                kv_connector="PdserveConnector",
                kv_connector_module_path="cluster.kv.connector",
                kv_role="kv_both",
                kv_load_failure_policy="fail",
                kv_connector_extra_config={
                    "worker_id": self._worker_id,
                    "incarnation": self._incarnation,
                    "model_digest": digest,
                    "max_ahead_bytes": self._handoff.max_ahead_bytes,
                    "transport": {
                        "transport": self._handoff.transport,
                        "host": self._handoff.host or self._host,
                        "ports": self._handoff.ports,
                        "max_message_bytes": self._handoff.max_message_bytes,
                        "max_streams": self._handoff.max_streams,
                        "link_checksums": self._handoff.link_checksums,
                        "link_seconds": self._handoff.link_seconds,
                        "link_max_ctas": self._handoff.link_max_ctas,
                        "link_bytes": self._handoff.link_bytes,
                    },
                },
            ),
        }
        return AsyncEngineArgs(**{**chosen, **model.engine_args})

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        prompt: Any = {"prompt_token_ids": request.prompt_token_ids}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        params = to_vllm(request.sampling, request.handoff)
        try:
            async for output in self._running.generate(prompt, params, request.sequence_id):
                yield _output(output)
        except EngineDeadError as error:
            raise EngineFailed("the engine has died") from error
        except (ValueError, VLLMClientError, EngineGenerateError) as error:
            raise _refusal(request, error) from error

    def expect_handoff(self, handoff_id: str) -> None:
        self._results.expect(handoff_id)

    async def handoff_result(self, handoff_id: str) -> HandoffResult:
        return await self._results.wait(handoff_id)

    def forget_handoff(self, handoff_id: str) -> None:
        self._results.forget(handoff_id)

    async def holdings(self) -> Holdings:
        try:
            ranks = await self.ask_ranks("pdserve_holdings")
        except EngineDeadError as error:
            raise EngineFailed("the engine has died") from error
        resident = {"front end": psutil.Process().memory_info().rss}
        known = {rank["pid"] for rank in ranks}
        for rank, held in enumerate(ranks):
            resident[f"engine worker {rank}"] = held["resident_bytes"]
        for child in multiprocessing.active_children():
            with suppress(psutil.Error):  # it has ended meanwhile
                if child.pid not in known and child.name.startswith(ENGINE_CORE):
                    resident["engine core"] = psutil.Process(child.pid).memory_info().rss
        entries = tuple(
            PinnedKv(e["handoff_id"], e["reason"], e["blocks"], e["bytes"], e["lease_left"])
            for held in ranks
            for e in held["ledger"]
        )
        used = round(self._stats.kv_usage * max(self._num_blocks - 1, 0))
        return Holdings(
            entries,
            used,
            self._num_blocks,
            resident,
            leaked_blocks=sum(held["leaked_blocks"] for held in ranks),
            ahead_bytes=self._stats.ahead_bytes,
            waiting_for_credit=self._stats.waiting_for_credit,
        )

    async def ask_ranks(self, method: str, *args: Any) -> list[Any]:
        """What a method of the worker extension returns, rank by rank."""
        answers: list[Any] = await self._running.collective_rpc(method, args=args)
        return answers

    async def dead(self) -> str:
        while not self._running.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(DEATH_POLL_SECONDS)
        return "an engine process has died; its log tells why"

    async def stop(self) -> None:
        self._kv_events.stop()
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    @property
    def _running(self) -> Any:
        if self._llm is None:
            raise EngineFailed("the engine is not started")
        return self._llm


def _processes(ranks: int) -> dict[str, Any]:
    """Whose executor and worker; vLLM's own beside GPUs."""
    if not current_platform.is_cpu():
        return {"worker_cls": "auto"}
    return {
        "worker_cls": "cluster.engine.cpu_worker.SeededCpuWorker",
        "distributed_executor_backend": "cluster.engine.cpu_executor."
        + ("CpuExecutor" if ranks == 1 else "CpuExecutorOfSeveral"),
    }


def _refusal(request: EngineRequest, error: Exception) -> PdserveError:
    """vLLM checks a request's parameters, and compiles its guide, before it takes it."""
    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    reason = str(cause).strip().split("\n")[0]
    if request.sampling.guide is not None:
        return InvalidRequest("sampling.guide", reason)
    if isinstance(cause, ValueError | VLLMClientError):
        return InvalidRequest("sampling", reason)
    log.error("request %s was not taken", request.sequence_id, exc_info=error)
    return EngineFailed("the engine could not take the request")


def _output(output: RequestOutput) -> EngineOutput:
    completion = output.outputs[0]
    logprobs: tuple[TokenLogprobs, ...] = ()
    if completion.logprobs:
        logprobs = tuple(
            _logprobs(token, dict(position))
            for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
        )
    metrics = output.metrics
    return EngineOutput(
        token_ids=list(completion.token_ids),
        text=completion.text,
        logprobs=logprobs,
        finish_reason=_FINISH.get(completion.finish_reason or ""),  # type: ignore[arg-type]
        stop=completion.stop_reason,
        scheduled_at=metrics.scheduled_ts if metrics else 0.0,
        cached_tokens=output.num_cached_tokens or 0,
    )


def _logprobs(token: int, position: dict[int, Any]) -> TokenLogprobs:
    """vLLM lists the sampled token and the top ones in one dict; a rank tells them apart."""
    entries = {
        i: Logprob(i, p.logprob, p.rank or 0, p.decoded_token or "") for i, p in position.items()
    }
    top = sorted(entries.values(), key=lambda entry: entry.rank)
    return TokenLogprobs(entries[token], tuple(top))
