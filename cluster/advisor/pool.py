"""Runs the advisor's tasks on this machine's cores."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from cluster.advisor.contest import Task


class Pool:
    """A few processes; `run` gives results in the order of the tasks, and tells of each.

    Args:
        tell: is called with (done, of) tasks.
    """

    def __init__(self, tell: Callable[[int, int], None], processes: int | None = None) -> None:
        self._tell = tell
        self._processes = processes or min(8, os.cpu_count() or 1)
        self._done = self._of = 0
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        # Spawned and not forked: the parent may have threads, which a fork would freeze.
        context = multiprocessing.get_context("spawn")
        # Simulations leave next to no cycles: looking for them as often as by default takes 5 %.
        self._executor = ProcessPoolExecutor(
            self._processes, mp_context=context, initializer=gc.set_threshold, initargs=(50_000,)
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def run(self, tasks: Sequence[Task]) -> Iterator[object]:
        assert self._executor is not None
        self._of += len(tasks)
        futures = [self._executor.submit(call, *arguments) for call, arguments in tasks]
        for future in futures:
            result = future.result()
            self._done += 1
            self._tell(self._done, self._of)
            yield result
