"""vLLM's executors for hosts whose cores are the accelerator."""

from __future__ import annotations

import os

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from cluster.engine.cpu_waits import leave_cores_to_others


class CpuExecutor(UniProcExecutor):
    """The one worker lives in the engine core's process, as vLLM has it on GPUs."""

    def _init_executor(self) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        super()._init_executor()


class CpuExecutorOfSeveral(MultiprocExecutor):
    """Worker processes; it does not spin while they compute."""

    def _init_executor(self) -> None:
        leave_cores_to_others()
        super()._init_executor()
