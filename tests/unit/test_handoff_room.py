"""vLLM's own scheduler with what pdserve adds, in a cache so small that requests take it whole."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cluster.kv.connector.landings import make_scheduler
from cluster.kv.connector.step import StepReport
from cluster.kv.handoff import HandoffParams, Side

MODEL = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"
BLOCK = 16
FIRST, LATER = 7, 9


class Engine:
    """The scheduler, and a model that always says the same.

    Args:
        blocks: that requests can have.
        ahead: it plans a step before it has seen the last one's outcome.
        ahead_bytes: it may pin ahead of grants.
    """

    def __init__(self, blocks: int, ahead: bool = False, ahead_bytes: int = 0) -> None:
        self._ahead = ahead
        config = VllmConfig(
            model_config=ModelConfig(model=str(MODEL), dtype="float32", max_model_len=4 * BLOCK),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_model_len=4 * BLOCK,
                is_encoder_decoder=False,
                max_num_batched_tokens=256,
                async_scheduling=ahead,
            ),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(
                kv_connector="PdserveConnector",
                kv_connector_module_path="cluster.kv.connector",
                kv_role="kv_both",
                kv_load_failure_policy="fail",
                kv_connector_extra_config={
                    "worker_id": "decode",
                    "incarnation": "decode-1",
                    "model_digest": "",
                    "max_ahead_bytes": ahead_bytes,
                    "transport": {},
                },
            ),
        )
        config.cache_config.num_gpu_blocks = blocks + 1  # vLLM keeps one for itself
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler: Any = make_scheduler(
            config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, partial(sha256))
        self._planned: list[SchedulerOutput] = []
        self.said: dict[str, list[int]] = {}
        self.failed: set[str] = set()

    def ask(self, name: str, prompt: int, max_tokens: int = 4, side: Side = "decode") -> None:
        """A request that is handed off, with a prompt of its own of so many tokens."""
        handoff = HandoffParams(side, f"h-{name}", "ticket", prompt, 30.0)
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": handoff.to_dict()},
        )
        tokens = [ord(name)] * prompt
        self.scheduler.add_request(Request(name, tokens, params, None, block_hasher=self._hasher))

    def land(self) -> set[str]:
        """All that has taken blocks and waits for its KV."""
        waits = RequestStatus.WAITING_FOR_REMOTE_KVS
        names = {each.request_id for each in self.scheduler.kv_holding_waiting}
        names = {name for name in names if self.scheduler.requests[name].status == waits}
        names -= self.scheduler.finished_recving_kv_req_ids
        report = StepReport(first_tokens=dict.fromkeys(names, FIRST))
        self.scheduler._update_from_kv_xfer_finished(
            KVConnectorOutput(finished_recving=names, kv_connector_worker_meta=report)
        )
        return names

    def step(self) -> SchedulerOutput:
        planned: SchedulerOutput = self.scheduler.schedule()
        self._planned.append(planned)
        if len(self._planned) > self._ahead:
            self._compute(self._planned.pop(0))
        return planned

    def _compute(self, planned: SchedulerOutput) -> None:
        names = list(planned.num_scheduled_tokens)
        came = self.scheduler.update_from_output(
            planned,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[[LATER] for _ in names],
            ),
        )
        for output in (each for some in came.values() for each in some.outputs):
            self.said.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason == FinishReason.ERROR:
                self.failed.add(output.request_id)


@pytest.fixture(params=[False, True], ids=["in turn", "one ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_prompts_that_fill_their_blocks_and_the_cache_go_on(ahead: bool) -> None:
    """Behind each is its first token's block: who gets none where no one runs waits for ever."""
    engine = Engine(blocks=6, ahead=ahead)
    engine.ask("a", 3 * BLOCK)
    engine.ask("b", 3 * BLOCK)
    for _ in range(30):
        engine.step()
        engine.land()
    assert engine.said == {name: [FIRST, LATER, LATER, LATER] for name in "ab"}
    assert not engine.scheduler.requests and not engine.scheduler._untold


def test_prompts_ahead_of_their_grants_leave_first_tokens_their_blocks(ahead: bool) -> None:
    """They keep theirs until another engine has room, which may wait for the like of it here."""
    engine = Engine(blocks=12, ahead=ahead, ahead_bytes=1 << 30)
    for name in "abcd":
        engine.ask(name, BLOCK)
    engine.step()
    for name in "pqrs":  # with the other four they fill the cache
        engine.ask(name, 2 * BLOCK, max_tokens=1, side="prefill")
    for _ in range(30):
        engine.step()
        engine.land()
    decoded = {name: [FIRST, LATER, LATER, LATER] for name in "abcd"}
    assert engine.said == decoded | {name: [LATER] for name in "pqrs"}


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_ends(ahead: bool, seed: int) -> None:
    """Of any length, with preemptions; nothing is lost, repeated or left behind."""
    draw = random.Random(seed)
    engine = Engine(blocks=6, ahead=ahead)
    wanted = {}
    for name in "abcdefghijklmnopqrst":
        prompt, output = draw.choice((BLOCK, 2 * BLOCK, draw.randint(2, 30))), draw.randint(2, 32)
        engine.ask(name, prompt, output)
        wanted[name] = [FIRST, *[LATER] * (output - 1)]
    preempted = 0
    for _ in range(1000):
        preempted += len(engine.step().preempted_req_ids or ())
        if draw.random() < 0.5:
            engine.land()
        if not engine.scheduler.requests:
            break
    assert engine.said == wanted
    assert preempted and not engine.scheduler._untold


@pytest.mark.parametrize(("prompt", "max_tokens"), [(20, 1), (4 * BLOCK - 1, 2)])
def test_nothing_is_computed_behind_a_first_token_that_is_the_last(
    ahead: bool, prompt: int, max_tokens: int
) -> None:
    """The router sends no such request; the model runner would die of one."""
    engine = Engine(blocks=8, ahead=ahead)
    engine.ask("a", prompt, max_tokens)
    engine.ask("b", 4 * BLOCK - 2, 2)
    for _ in range(10):
        assert "a" not in engine.step().num_scheduled_tokens
        engine.land()
    assert engine.failed == {"a"} and engine.said == {"a": [], "b": [FIRST, LATER]}
    assert not engine.scheduler.requests and not engine.scheduler._untold
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 8
