"""vLLM's CPU worker, made safe for seeded requests whose prompt takes several steps; it does not
spin while it has nothing to compute.

While a prompt is not complete the token sampled for it is discarded, and the model runner rewinds
the request's generator by the draw. CPU generators cannot rewind: vLLM 0.32 raises, and the engine
dies. Here such a request's generator is set aside for the step instead, so it is not drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from cluster.engine.cpu_waits import leave_cores_to_others


class SeededCpuWorker(CPUWorker):
    """A CPUWorker that does not draw from the generators of incomplete prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        leave_cores_to_others()
        super().__init__(*args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        with _incomplete_prompts_undrawn(self.model_runner):
            return super().sample_tokens(grammar_output)


@contextmanager
def _incomplete_prompts_undrawn(runner: Any) -> Iterator[None]:
    generators = runner.input_batch.generators
    incomplete = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    aside = {int(row): generators.pop(int(row)) for row in incomplete if int(row) in generators}
    try:
        yield
    finally:
        generators.update(aside)
