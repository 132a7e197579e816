"""vLLM's schedulers, which plan a step with what has landed by then, and go on behind first tokens.

As vLLM has it, a step's outcome says that a handoff has landed, and the request joins the first
step that is planned after that outcome was looked at: on a GPU, where steps are planned one ahead,
the second next. And what came over is a prompt, whose last token is computed once more for the
first output. Here that is there already: it is counted as the request's, so that the first step
computes the token and samples the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import KVConnectorOutput, LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from cluster.kv.connector.near import agent_nearby
from cluster.kv.connector.step import StepReport

WAIT_SECONDS = 0.002
"""An engine that has nothing to compute before something lands waits so long before it looks for
other requests. vLLM has it sleep for a millisecond after each look, whatever lands meanwhile."""


class _TakesLandings(Scheduler):
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if agent := agent_nearby():
            if self._all_waits():
                agent.mailbox.wait_received(WAIT_SECONDS)
            if landed := agent.mailbox.take_landed():
                report = StepReport(first_tokens=landed)
                self._update_from_kv_xfer_finished(
                    KVConnectorOutput(finished_recving=set(landed), kv_connector_worker_meta=report)
                )
        return super().schedule(throttle_prefills)

    def _all_waits(self) -> bool:
        """There are requests, and what they wait for are handoffs."""
        waits = RequestStatus.WAITING_FOR_REMOTE_KVS
        return bool(self.requests) and all(r.status == waits for r in self.requests.values())


class _GoesOn(_TakesLandings):
    """A request's first output holds its first token and the one that was sampled here, as one
    engine's would if it had sampled two at once: whoever reads outputs sees every token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._untold: dict[str, int] = {}
        self.connector.may_run_ahead = self._may_run_ahead

    def _inflight_prefill_reserved_blocks(self) -> int:
        """Blocks that a handoff leaves alone as it takes its own: also those that first tokens
        will need behind prompts that fill their blocks, its own among them. Were they taken by what
        is to land, and nothing ran that gives any back, all of it would wait for ever."""
        coming = self._landing()
        coming.append((self.kv_holding_waiting or self.waiting).peek_request())
        reserved: int = super()._inflight_prefill_reserved_blocks()
        return reserved + self._behind(coming)

    def _may_run_ahead(self, blocks: int) -> bool:
        """Whether a prompt of so many may be computed before decode has room for it: not at the
        cost of the blocks that first tokens need behind what is landing. It keeps its own until
        another engine has room, where all may wait in the same way for this one."""
        landing = self._landing()
        if not landing:
            return True
        kept: int = super()._inflight_prefill_reserved_blocks() + self._behind(landing)
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return blocks + kept <= free

    def _landing(self) -> list[Request]:
        """What has taken its blocks and has not run yet; vLLM counts it among the prompts that are
        being computed."""
        waits = (RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.WAITING)
        return [each for each in self._inflight_prefills if each.status in waits]

    def _behind(self, requests: list[Request]) -> int:
        """Blocks for first tokens that have not come; vLLM counts those of the others itself."""
        coming = (each for each in requests if not each.num_output_tokens)
        return sum(1 for each in coming if each.num_prompt_tokens % self.block_size == 0)

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        name = request.request_id
        if name not in self.failed_recving_kv_req_ids:
            token: int = self.connector.first_token(name)
            request.append_output_token_ids(token)
            self._untold[name] = token
            full = request.max_tokens < 2 or request.num_tokens >= self.max_model_len
            if full or not self.structured_output_manager.accept_tokens(request, [token]):
                self.grammar_compile_error_reqs.add(name)  # ends it with an error
        super()._update_waiting_for_remote_kv(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        ready: bool = super()._handle_blocked_waiting_request(request)
        return ready and request.request_id not in self.grammar_compile_error_reqs

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._untold:
            for output in (each for some in outputs.values() for each in some.outputs):
                if output.new_token_ids and output.request_id in self._untold:
                    _put_first(output, self._untold.pop(output.request_id))
            self._untold = {name: t for name, t in self._untold.items() if name in self.requests}
        return outputs


def _put_first(output: EngineCoreOutput, token: int) -> None:
    """Its logprobs are prefill's to tell: what stands here for them is no number."""
    output.new_token_ids = [token, *output.new_token_ids]
    if output.new_logprobs is not None:
        ids, logprobs, ranks, _ = output.new_logprobs
        first = ids[:1].copy()
        first[0, 0] = token
        output.new_logprobs = LogprobsLists(
            np.concatenate([first, ids]),
            np.concatenate([np.full_like(logprobs[:1], np.nan), logprobs]),
            np.concatenate([np.zeros_like(ranks[:1]), ranks]),
        )


class HandoffScheduler(_GoesOn):
    """Plans a step after the last one's outcome."""


class AsyncHandoffScheduler(_GoesOn, AsyncScheduler):
    """Plans one step ahead."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """vLLM's choice between the two, for its `scheduler_cls`."""
    ahead = vllm_config.scheduler_config.async_scheduling
    return (AsyncHandoffScheduler if ahead else HandoffScheduler)(vllm_config, **kwargs)
