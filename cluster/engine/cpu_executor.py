"""vLLM's executor of worker processes, for hosts whose cores are the accelerator."""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from cluster.engine.cpu_waits import leave_cores_to_others


class CpuExecutor(MultiprocExecutor):
    """Does not spin while its workers compute."""

    def _init_executor(self) -> None:
        leave_cores_to_others()
        super()._init_executor()
