"""vLLM's schedulers, which plan a step with what has landed by then.

As vLLM has it, a step's outcome says that a handoff has landed, and the request joins the first
step that is planned after that outcome was looked at: on a GPU, where steps are planned one ahead,
the second next.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput

from cluster.kv.connector.near import agent_nearby


class _TakesLandings(Scheduler):
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if (agent := agent_nearby()) and (landed := agent.mailbox.take_landed()):
            self._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving=landed))
        return super().schedule(throttle_prefills)


class HandoffScheduler(_TakesLandings):
    """Plans a step after the last one's outcome."""


class AsyncHandoffScheduler(_TakesLandings, AsyncScheduler):
    """Plans one step ahead."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """vLLM's choice between the two, for its `scheduler_cls`."""
    ahead = vllm_config.scheduler_config.async_scheduling
    return (AsyncHandoffScheduler if ahead else HandoffScheduler)(vllm_config, **kwargs)
