"""Sequences on virtual workers: prompts, handoffs, decodes, and what the router hears of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from cluster.errors import InvalidRequest, Unavailable
from cluster.planner.sharing import ALONE
from cluster.simulator.events import Agenda
from cluster.simulator.job import Attempt, Job
from cluster.simulator.placing import Placing
from cluster.simulator.worker import VirtualWorker
from cluster.simulator.workload import Arrival
from router.events import Event, Output, WorkerFailed
from router.output import FinishReason, Stage, WorkerReport
from router.placement import Target


class Serving:
    """Stands where links, workers and the handoff stand in a real cluster.

    Args:
        workers: by id; shared with the fleet.
        tell: takes an attempt's events to its request's machine.
        unused: is told of a draining worker that may have become unused.
    """

    def __init__(
        self,
        agenda: Agenda,
        workers: dict[str, VirtualWorker],
        tell: Callable[[Attempt, Event], None],
        unused: Callable[[VirtualWorker], None],
        placing: Placing,
    ) -> None:
        self._agenda = agenda
        self._workers = workers
        self._tell = tell
        self._unused = unused
        self._placing = placing

    def start(self, attempt: Attempt, target: Target, stage: Stage, arrival: Arrival) -> None:
        """Hands a sequence to a worker."""
        now, worker = self._agenda.now, self._workers[target.worker_id]
        job = Job(attempt, stage, arrival.prompt, arrival.output, arrival.blocks)
        attempt.jobs[stage] = job
        attempt.targets[stage] = target
        self._placing.took(now, attempt, stage)
        if job.kv_tokens > worker.engine.performance.kv_capacity:
            self._refuse(job, worker)
        elif stage is Stage.DECODE:
            worker.loaded(running=1, reserved=job.kv_tokens)
            if worker.engine.reserve(now, job):
                self._handoff(attempt)
        else:
            whole = stage is Stage.WHOLE
            worker.loaded(arrival.prompt, int(whole), job.kv_tokens if whole else 0)
            if seconds := worker.engine.performance.dispatch:
                others = (w for w in self._workers.values() if w is not worker)
                if any(other.engine.step for other in others):
                    seconds *= worker.engine.performance.contention.dispatch
                self._agenda.after(seconds, lambda: self._arrives(worker, job))
            else:
                self._arrives(worker, job)

    def _arrives(self, worker: VirtualWorker, job: Job) -> None:
        """A prompt reaches its engine, unless it was given up on the way."""
        if job.attempt.jobs.get(job.stage) is job:
            worker.engine.prefill(self._agenda.now, job)
            self._watch(worker)

    def cancel(self, attempt: Attempt, target: Target) -> None:
        """The router gives a sequence up on one worker."""
        for stage, at in attempt.targets.items():
            if at == target and stage in attempt.jobs:
                self._drop(attempt, stage)
                return

    def close(self, attempt: Attempt) -> None:
        """The attempt is over: whatever it still holds is freed."""
        attempt.over = True
        for stage in list(attempt.jobs):
            self._drop(attempt, stage)

    def lost(self, worker: VirtualWorker, attempt: Attempt) -> None:
        """The worker's process died under the attempt; call it before the engine is replaced."""
        for stage, job in list(attempt.jobs.items()):
            if attempt.targets[stage] != worker.view.target or attempt.over:
                continue
            if job.last_step:
                done = min(worker.engine.tokens_done(self._agenda.now, job), job.output - 1)
                start = 0 if stage is Stage.DECODE else 1
                if done > start:
                    tokens = (0,) * (done - start)
                    self._tell(attempt, Output(attempt.sequence_id, stage, start, tokens, ""))
            del attempt.jobs[stage]
            self._placing.released(self._agenda.now, attempt, stage)
            error = Unavailable(f"worker {worker.worker_id} was lost")
            self._tell(attempt, WorkerFailed(attempt.sequence_id, stage, error))

    def _refuse(self, job: Job, worker: VirtualWorker) -> None:
        del job.attempt.jobs[job.stage]
        self._placing.released(self._agenda.now, job.attempt, job.stage)
        error = InvalidRequest(
            "prompt",
            f"{job.kv_tokens} tokens do not fit into {worker.worker_id}'s KV cache of "
            f"{worker.engine.performance.kv_capacity}",
        )
        self._tell(job.attempt, WorkerFailed(job.attempt.sequence_id, job.stage, error))

    def _watch(self, worker: VirtualWorker) -> None:
        """What it does has changed: so may the pace of those that share its host."""
        if worker.engine.performance.contention != ALONE:
            for moved in self._share_host():
                self._schedule(moved)
        self._schedule(worker)

    def _share_host(self) -> list[VirtualWorker]:
        """Sets every worker's pace by the steps that are under way now; whose next event moved.

        A step is slowed by each other worker's step as much as by one.
        """
        now, moved = self._agenda.now, []
        busy = sum(worker.engine.step is not None for worker in self._workers.values())
        for worker in self._workers.values():
            if (step := worker.engine.step) is not None:
                slowed = worker.engine.performance.contention.slowed(step) - 1.0
                if worker.engine.set_pace(now, 1.0 + slowed * (busy - 1)):
                    moved.append(worker)
        return moved

    def _schedule(self, worker: VirtualWorker) -> None:
        """Advances the engine at its next event, unless that has moved by then."""
        engine, when = worker.engine, worker.engine.next_event
        if when != math.inf:
            self._agenda.at(when, lambda: self._advance(worker, when, engine))

    def _advance(self, worker: VirtualWorker, when: float, engine: object) -> None:
        if worker.engine is not engine or worker.engine.next_event != when:
            return
        finished = worker.engine.advance(self._agenda.now)
        self._watch(worker)
        for job in finished.first_tokens:
            if not job.cancelled:
                self._first_token(worker, job)
        for job in finished.ended:
            if not job.cancelled:
                self._ended(worker, job)
        self._settle(worker)

    def _settle(self, worker: VirtualWorker) -> None:
        """KV was freed, or work has left: who waits for that goes on."""
        now, engine = self._agenda.now, worker.engine
        if engine.reserving:
            for job in engine.granted(now):
                self._handoff(job.attempt)
        if engine.waiting and engine.next_event == math.inf:
            engine.wake(now)
            self._watch(worker)
        if worker.phase == "draining":
            self._unused(worker)

    def _first_token(self, worker: VirtualWorker, job: Job) -> None:
        attempt, last = job.attempt, job.output == 1
        worker.loaded(queued=-job.prompt)
        self._placing.answered(self._agenda.now, attempt, job.stage)
        if last or job.stage is Stage.PREFILL:
            self._placing.released(self._agenda.now, attempt, job.stage)
        report = None
        if ends := last or job.stage is Stage.PREFILL:
            report = WorkerReport(cached_prompt_tokens=job.cached)
            if last:
                del attempt.jobs[job.stage]
                if job.stage is Stage.WHOLE:
                    worker.loaded(running=-1, reserved=-job.kv_tokens)
                else:
                    worker.engine.release(job)
        if job.stage is Stage.PREFILL and not last:
            self._handoff(attempt)
        finish = FinishReason.LENGTH if ends else None
        self._tell(
            attempt,
            Output(attempt.sequence_id, job.stage, 0, (0,), "", finish=finish, report=report),
        )

    def _ended(self, worker: VirtualWorker, job: Job) -> None:
        attempt = job.attempt
        if job.output == 1:
            return  # Its first token was its end.
        del attempt.jobs[job.stage]
        worker.loaded(running=-1, reserved=-job.kv_tokens)
        self._placing.released(self._agenda.now, attempt, job.stage)
        start = 0 if job.stage is Stage.DECODE else 1
        self._tell(
            attempt,
            Output(
                attempt.sequence_id,
                job.stage,
                start,
                (0,) * (job.output - start),
                "",
                finish=FinishReason.LENGTH,
                report=WorkerReport(cached_prompt_tokens=job.cached),
            ),
        )

    def _handoff(self, attempt: Attempt) -> None:
        """The KV goes over once the prompt is computed and its place is reserved.

        It leaves layer by layer while the prompt is computed, if its place was granted by then;
        what the link still has to do for earlier ones comes first.
        """
        prefill, decode = attempt.jobs.get(Stage.PREFILL), attempt.jobs.get(Stage.DECODE)
        if prefill is None or decode is None or decode.landing:
            return
        if decode.grant_at is None or prefill.remaining or not prefill.prefill_seconds:
            return
        decode.landing = True
        now = self._agenda.now
        source = self._workers[attempt.targets[Stage.PREFILL].worker_id]
        performance = source.engine.performance
        if lost := performance.contention.handoff:
            target = self._workers[attempt.targets[Stage.DECODE].worker_id]
            target.engine.lose(now, lost)
            self._schedule(target)
        early = decode.grant_at <= (prefill.scheduled_at or 0.0)
        hidden = prefill.prefill_seconds if early else 0.0
        ahead = max(0.0, source.egress_free_at - now)
        exposed = performance.exposed_handoff_seconds(prefill.prompt, max(0.0, hidden - ahead))
        landed = now + ahead + exposed
        source.egress_free_at = landed - performance.handoff.latency
        self._agenda.at(landed, lambda: self._landed(prefill, decode))

    def _landed(self, prefill: Job, decode: Job) -> None:
        attempt = decode.attempt
        if attempt.jobs.get(Stage.DECODE) is not decode:
            return
        if attempt.jobs.get(Stage.PREFILL) is prefill:
            source = self._workers[attempt.targets[Stage.PREFILL].worker_id]
            del attempt.jobs[Stage.PREFILL]
            source.engine.release(prefill)
            self._settle(source)
        worker = self._workers[attempt.targets[Stage.DECODE].worker_id]
        self._placing.answered(self._agenda.now, attempt, Stage.DECODE)
        worker.engine.decode(self._agenda.now, decode)
        self._watch(worker)

    def _drop(self, attempt: Attempt, stage: Stage) -> None:
        job, target = attempt.jobs.pop(stage), attempt.targets[stage]
        self._placing.released(self._agenda.now, attempt, stage)
        worker = self._workers[target.worker_id]
        if worker.view.target != target:
            return  # That life is over, and all it held.
        if stage is not Stage.DECODE and job.remaining:
            worker.loaded(queued=-job.prompt)
        if stage is not Stage.PREFILL:
            worker.loaded(running=-1, reserved=-job.kv_tokens)
        worker.engine.drop(self._agenda.now, job)
        self._watch(worker)
        self._settle(worker)
