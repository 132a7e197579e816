"""A virtual engine: continuous batching with chunked prefill, one step after another.

It schedules as vLLM does: decodes first, then prompts in order of arrival, up to a token budget and
as long as there is KV room. Its one liberty: a sequence's KV is reserved as a whole when it starts,
so nothing is ever preempted. While only decodes run, all steps until the next end of one are a
single event: their times are an arithmetic series. An arrival cuts the run at the next step.

Where the performance says that steps are planned ahead, steps of prompts alone are (vLLM's
`step_with_batch_queue`): one thread starts them, and once a step is started it starts another of
what waits by then, before it looks at the first one's outcome. Beside decodes it is not simulated.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from cluster.planner.performance import Launch, Performance, StepKind
from cluster.simulator.job import Job
from cluster.simulator.prefix_cache import PrefixCache
from cluster.simulator.run import Run
from cluster.simulator.step import Finished, Step, begun_by, start, tokens_of
from router.output import Stage


@dataclass(frozen=True)
class EngineLimits:
    """How an engine forms its steps.

    Attributes:
        max_tokens: per step: the prefill chunk.
        max_sequences: per step.
        mixes: a step may hold prompts and decodes (chunked prefill); if not, prompts go first and
            whole, and decodes wait for them, as in vLLM before 0.6 and in DistServe.
        cache_share: of the KV capacity, kept for prefixes while sequences leave room.
    """

    max_tokens: int = 8192
    max_sequences: int = 256
    mixes: bool = True
    cache_share: float = 0.5


class Engine:
    """One worker's engine. `next_event` is when `advance` wants to be called."""

    def __init__(self, performance: Performance, limits: EngineLimits, block_tokens: int) -> None:
        self.performance = performance
        self.limits = limits
        self.cache = PrefixCache(int(performance.kv_capacity * limits.cache_share / block_tokens))
        self._block_tokens = block_tokens
        self.busy_seconds = 0.0
        self.free_tokens = performance.kv_capacity
        self.waiting: deque[Job] = deque()
        self.reserving: deque[Job] = deque()
        self._decoding: list[tuple[int, int, Job]] = []
        self._context = 0
        self._step = 0
        self._run = Run()
        self._chunks: list[tuple[Job, int]] = []
        self._began = 0.0
        self._decodes = False
        self._started: Step | None = None
        self._landed: list[Job] = []
        self._order = 0

    @property
    def next_event(self) -> float:
        return self._run.ends_at

    @property
    def batch(self) -> int:
        """Sequences that decode."""
        return len(self._decoding)

    @property
    def idle(self) -> bool:
        return self._run.steps == 0 and not self.waiting and not self.reserving

    @property
    def step(self) -> StepKind | None:
        """What is under way; a step with a prompt in it is a prefill."""
        if self._run.steps == 0:
            return None
        return "prefill" if self._chunks or self._started else "decode"

    def set_pace(self, now: float, pace: float) -> bool:
        """What its steps take from now on, as a multiple; True if that moves the next event."""
        return self._run.set_pace(now, pace)

    def lose(self, now: float, seconds: float) -> None:
        """Whatever is under way ends so much later."""
        if self._run.steps:
            self._run.lose(now, seconds)

    def prefill(self, now: float, job: Job) -> None:
        """Queues a prompt; the job's stage says whether its decode follows here."""
        self.waiting.append(job)
        self._poke(now)

    def reserve(self, now: float, job: Job) -> bool:
        """Takes a decode's KV room; False: it waits for its turn in `reserving`."""
        if not self.reserving and self._take(job):
            job.grant_at = now
            return True
        self.reserving.append(job)
        return False

    def granted(self, now: float) -> list[Job]:
        """Those that waited and have their room now."""
        jobs: list[Job] = []
        while self.reserving and self._take(self.reserving[0]):
            job = self.reserving.popleft()
            job.grant_at = now
            jobs.append(job)
        return jobs

    def decode(self, now: float, job: Job) -> None:
        """A reserved job's KV and first token have landed: it joins at the next step."""
        self._landed.append(job)
        self._poke(now)

    def release(self, job: Job) -> None:
        """Gives a job's KV back."""
        self.free_tokens += job.reserved
        job.reserved = 0

    def wake(self, now: float) -> None:
        """KV was given back from outside: an idle engine tries again."""
        if self._run.steps == 0 and self.waiting:
            self._begin(now)

    def drop(self, now: float, job: Job) -> None:
        """A cancelled job leaves; one that is in the present step leaves with its end."""
        job.cancelled = True
        for queue in (self.waiting, self.reserving):
            if job in queue:
                queue.remove(job)
        if job in self._landed:
            self._landed.remove(job)
        if not any(job is chunk for chunk, _ in self._under_way()):
            self.release(job)
            kept = [entry for entry in self._decoding if entry[2] is not job]
            if len(kept) != len(self._decoding):
                self._cut(now)
                done = job.output - (job.last_step - self._step)
                self._context -= job.prompt + done
                self._decoding = kept
                self._decoding.sort()

    def tokens_done(self, now: float, job: Job) -> int:
        """Tokens of a decoding job that have been sampled by now."""
        done = self._step + (self._run.steps_by(now) if not self._chunks else 0)
        return job.output - max(0, job.last_step - done)

    def jobs(self) -> list[Job]:
        """Everything on it."""
        under_way = dict.fromkeys(job for job, _ in self._under_way())
        chunks = [job for job in under_way if job not in self.waiting]
        decoding = [entry[2] for entry in self._decoding]
        return [*self.waiting, *self.reserving, *self._landed, *chunks, *decoding]

    def advance(self, now: float) -> Finished:
        """The end of the present run: what it finished; the next run begins."""
        finished = Finished([], [])
        self.busy_seconds += now - self._run.began
        steps = self._run.end()
        if self._decodes:
            self._step += steps
            self._context += steps * len(self._decoding)
        self._end_decodes(finished)
        if self._chunks:
            self._end_chunks(now, finished)
        self._begin(now)
        return finished

    def _under_way(self) -> list[tuple[Job, int]]:
        return [*self._chunks, *(self._started.chunks if self._started else ())]

    def _end_decodes(self, finished: Finished) -> None:
        while self._decoding and self._decoding[0][0] <= self._step:
            _, _, job = heappop(self._decoding)
            self._context -= job.prompt + job.output
            self.release(job)
            finished.ended.append(job)

    def _end_chunks(self, now: float, finished: Finished) -> None:
        chunks, self._chunks = self._chunks, []
        for job, new in chunks:
            job.computed += new
            job.planned -= new
            job.remaining -= new
            if job.remaining or job.cancelled:
                if job.cancelled:
                    self.release(job)
                continue
            job.prefill_seconds = now - self._began
            self.cache.put(job.blocks)
            finished.first_tokens.append(job)
            if job.stage is Stage.WHOLE:
                if job.output == 1:
                    self.release(job)
                    finished.ended.append(job)
                else:
                    self._join(job)

    def _join(self, job: Job) -> None:
        """It has its first token; each step from now on gives it another."""
        job.last_step = self._step + job.output - 1
        self._order += 1
        self._context += job.prompt + 1
        heappush(self._decoding, (job.last_step, self._order, job))

    def _poke(self, now: float) -> None:
        """Something new is there: an idle engine starts, a run of decodes is cut."""
        if self._run.steps == 0:
            self._begin(now)
        else:
            self._cut(now)

    def _cut(self, now: float) -> None:
        if not self._chunks and self._run.steps > 1:
            self._run.cut(now)

    def _begin(self, now: float) -> None:
        for job in self._landed:
            self._join(job)
        self._landed.clear()
        if self.performance.launch and (self._started or not self._decoding):
            self._begin_prompts(now, self.performance.launch)
            return
        self._chunks, self._began = self._schedule(now), now
        self._decodes = self.limits.mixes or not self._chunks
        if self._chunks:
            batch = len(self._decoding) if self.limits.mixes else 0
            prompts = tokens_of(self._chunks)
            context = self._context if batch else 0
            begun = begun_by(self._chunks)
            seconds = self.performance.mixed_seconds(prompts, batch, context)
            self._run.begin(now, 1, seconds + begun * self.performance.prefill.once)
        elif self._decoding:
            batch = len(self._decoding)
            cost = self.performance.decode_cost(batch)
            first = cost.base + cost.per_sequence * batch + cost.per_context * self._context
            steps = max(1, self._decoding[0][0] - self._step)
            self._run.begin(now, steps, first, cost.per_context * batch)
        else:
            self._run.begin(now, 0, 0.0)

    def _begin_prompts(self, now: float, launch: Launch) -> None:
        """Starts what waits, and lets the run end when the step that was started before is told."""
        before, chunks = self._started, self._schedule(now) if not self._decoding else []
        self._chunks, self._began = (before.chunks, before.began) if before else ([], now)
        self._decodes = False
        self._started, ends_at = start(self.performance, launch, now, before, chunks)
        self._run.begin(now, 1 if before or chunks else 0, ends_at - now)

    def _schedule(self, now: float) -> list[tuple[Job, int]]:
        chunks: list[tuple[Job, int]] = []
        limits = self.limits
        budget = limits.max_tokens - (len(self._decoding) if limits.mixes else 0)
        room = limits.max_sequences - len(self._decoding)
        while self.waiting and budget > 0 and room > 0:
            job = self.waiting[0]
            if not job.reserved:
                if not self._take(job):
                    break
                self._look_up(now, job)
            left = job.remaining - job.planned
            if not limits.mixes and chunks and left > budget:
                break
            new = min(left, budget) if limits.mixes else left
            job.planned += new
            chunks.append((job, new))
            budget -= new
            room -= 1
            if new == left:
                self.waiting.popleft()
        return chunks

    def _look_up(self, now: float, job: Job) -> None:
        job.scheduled_at = now
        held = self.cache.held(job.blocks) * self._block_tokens if job.blocks else 0
        job.cached = job.computed = min(held, job.prompt - 1)
        job.remaining = job.prompt - job.cached

    def _take(self, job: Job) -> bool:
        if job.kv_tokens > self.free_tokens:
            return False
        job.reserved = job.kv_tokens
        self.free_tokens -= job.reserved
        return True
