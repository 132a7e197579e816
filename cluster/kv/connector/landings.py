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
from vllm.v1.request import RequestStatus

from cluster.kv.connector.near import agent_nearby

WAIT_SECONDS = 0.002
"""An engine that has nothing to compute before something lands waits so long before it looks for
other requests. vLLM has it sleep for a millisecond after each look, whatever lands meanwhile."""


class _TakesLandings(Scheduler):
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if agent := agent_nearby():
            if self._all_waits():
                agent.mailbox.wait_received(WAIT_SECONDS)
            if landed := agent.mailbox.take_landed():
                self._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving=landed))
        return super().schedule(throttle_prefills)

    def _all_waits(self) -> bool:
        """There are requests, and what they wait for are handoffs."""
        waits = RequestStatus.WAITING_FOR_REMOTE_KVS
        return bool(self.requests) and all(r.status == waits for r in self.requests.values())


class HandoffScheduler(_TakesLandings):
    """Plans a step after the last one's outcome."""


class AsyncHandoffScheduler(_TakesLandings, AsyncScheduler):
    """Plans one step ahead."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """vLLM's choice between the two, for its `scheduler_cls`."""
    ahead = vllm_config.scheduler_config.async_scheduling
    return (AsyncHandoffScheduler if ahead else HandoffScheduler)(vllm_config, **kwargs)
