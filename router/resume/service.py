"""Resumable requests on one router: begun, joined, followed elsewhere, taken over from there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.clock import Clock
from cluster.config_clients import ResumeConfig
from cluster.errors import InvalidRequest, NotFound, NotResumable, PdserveError, Unavailable
from cluster.store.streams import StreamHead, StreamName, Streams
from router.generation import Generation
from router.resume import codec
from router.resume.claims import Claim, Claims
from router.resume.follower import follow
from router.resume.recorder import Recorder
from router.resume.transcript import Reader, Transcript
from router.running import Running
from router.tokens import SentTokens
from router.validate import RequestIdTaken

CLAIM_TRIES = 5

log = logging.getLogger(__name__)


class Dispatch(Protocol):
    """Runs requests."""

    def submit(
        self, generation: Generation, sent: Sequence[SentTokens] | None = None
    ) -> Running: ...


@dataclass
class _Stream:
    """A stream with readers here, or running here."""

    transcript: Transcript
    task: asyncio.Task[None] | None = None
    recorder: Recorder | None = None
    grace: asyncio.TimerHandle | None = None
    held: bool = False
    """Its follower may have made it this router's: it ends in order, though nobody reads it."""

    def hold(self) -> None:
        self.held = True

    def let_go(self) -> None:
        self.held = False


class Resumption:
    """The resumable requests that this router runs or follows.

    Args:
        owner: this life of this router: `<router id> <incarnation>`, as the registry has it.
        streams: None where there is no store to keep them: nothing is resumable then.
    """

    def __init__(
        self,
        config: ResumeConfig,
        streams: Streams | None,
        dispatch: Dispatch,
        owner: str,
        clock: Clock,
    ) -> None:
        self._config = config
        self._store = streams
        self._claims = Claims(lambda: self._streams, owner, clock, config.window_seconds)
        self._dispatch = dispatch
        self._owner = owner
        self._clock = clock
        self._known: dict[str, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, generation: Generation, key: str) -> Reader:
        """Runs a request that can be resumed; a repetition under its key joins the first one.

        Raises:
            InvalidRequest: the key stands for another request.
            RequestIdTaken: another request that is kept has the id.
            Overloaded, Unavailable: there is no room, or no store to promise anything with.
        """
        name = StreamName(generation.tenant, generation.request_id, key)
        for _ in range(CLAIM_TRIES):
            holder, claim = await self._claims.claim(name, generation)
            if holder.mine:
                return await self._start(claim, generation)
            if not holder.request_id:
                raise RequestIdTaken(generation.request_id, "kept")
            first = StreamName(generation.tenant, holder.request_id, key)
            head = await self._streams.head(first)
            if head is None:
                continue  # It was refused meanwhile, and its key is free again.
            if head.fingerprint != codec.fingerprint(generation):
                raise InvalidRequest("idempotency_key", "was used for another request")
            # The first one's deadline is not this caller's.
            left = generation.deadline - self._clock.now()
            until = asyncio.get_running_loop().time() + left
            return self._attach(first, head).reader(until=until)
        raise Unavailable("the idempotency key changes hands too quickly")

    async def resume(self, tenant: str, request_id: str, next_offsets: Sequence[int]) -> Reader:
        """Goes on with a request from these offsets, wherever it ran.

        Raises:
            NotFound: the tenant has no such request.
            NotResumable: it has expired.
            InvalidRequest: there are more offsets than completions.
        """
        name = StreamName(tenant, request_id)
        if known := self._known.get(name.id):
            return known.transcript.reader(next_offsets)
        head = await self._streams.head(name)
        if head is not None:
            return self._attach(name, head).reader(next_offsets)
        if await self._streams.expired(name):
            raise NotResumable(
                f"request {request_id} has expired: a finished one is kept for "
                f"{self._config.window_seconds:g} s"
            )
        raise NotFound(f"request_id: there is no request {request_id} that can be resumed")

    async def stop(self) -> None:
        """Leaves what runs to the other routers; returns when the store knows."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._claims.stop()

    def abandon(self) -> None:
        """From now on what this router gives up is left to the others."""
        for stream in self._known.values():
            if stream.recorder is not None:
                stream.recorder.abandoning = True

    async def recorded(self, seconds: float) -> None:
        """Until the store has the ends of what ran here, at most so long."""
        recorders = [s.task for s in self._known.values() if s.recorder and s.task]
        if recorders:
            await asyncio.wait(recorders, timeout=seconds)

    @property
    def _streams(self) -> Streams:
        if self._store is None:
            raise Unavailable("this router keeps no streams: nothing can be resumed")
        return self._store

    async def _start(self, claim: Claim, generation: Generation) -> Reader:
        try:
            running = self._dispatch.submit(generation)
        except PdserveError:
            await self._claims.forget(claim)
            raise
        stream = self._new(claim.name, generation)
        reader = stream.transcript.reader()
        self._record(claim.name, stream, running, saved=0)
        return reader

    def _attach(self, name: StreamName, head: StreamHead) -> Transcript:
        """The transcript of a stream that ends in the store, or grows there or here."""
        if known := self._known.get(name.id):
            return known.transcript
        stream = self._new(name, codec.generation(head.asked, self._clock))
        self._spawn(name, stream, self._follow(name, stream))
        return stream.transcript

    def _new(self, name: StreamName, generation: Generation) -> _Stream:
        stream = _Stream(Transcript(generation, lambda: self._alone(name, stream)))
        self._known[name.id] = stream
        return stream

    def _record(self, name: StreamName, stream: _Stream, running: Running, saved: int) -> None:
        keep = self._config.window_seconds
        stream.recorder = Recorder(
            self._streams, name, self._owner, running, stream.transcript, self._clock, keep, saved
        )
        self._spawn(name, stream, stream.recorder.run())

    async def _follow(self, name: StreamName, stream: _Stream) -> None:
        """Reads what another router writes, until it ends; takes over when that router is gone."""
        transcript = stream.transcript
        try:
            if await follow(
                self._streams, name, transcript, self._owner, stream.hold, stream.let_go
            ):
                await self._go_on(name, stream)
        finally:
            stream.let_go()

    async def _go_on(self, name: StreamName, stream: _Stream) -> None:
        """With a stream that has just become this router's."""
        transcript = stream.transcript
        if not transcript.readers:
            return await self._streams.abandon(name, self._owner)
        try:
            sent = [SentTokens(i) for i in range(transcript.generation.sampling.n)]
            for delta in transcript.deltas:
                sent[delta.index].restore(delta)
            running = self._dispatch.submit(transcript.generation, sent)
        except PdserveError as error:
            transcript.close(error)
            if error.retryable:
                await self._streams.abandon(name, self._owner)
            else:
                keep, end = self._config.window_seconds, codec.end(error)
                await self._streams.finish(name, self._owner, end, keep)
            return
        log.info("stream %s: goes on here", name.id)
        self._record(name, stream, running, saved=len(transcript.deltas))

    def _spawn(self, name: StreamName, stream: _Stream, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except PdserveError as error:
                stream.transcript.close(error)
            except Exception as error:
                log.exception("stream %s broke", name.id)
                stream.transcript.close(PdserveError(f"the stream broke: {error!r}"))

        def ended(task: asyncio.Task[None]) -> None:
            work.close()  # it has not begun if the task was cancelled at once
            self._tasks.discard(task)
            if stream.task is not task:
                return
            if stream.transcript.end is None:
                stream.transcript.close(Unavailable("this router left the stream: resume it"))
            if not stream.transcript.readers:
                self._drop(name, stream)

        task = stream.task = asyncio.create_task(guarded(), name=f"stream {name.id}")
        self._tasks.add(task)
        task.add_done_callback(ended)

    def _alone(self, name: StreamName, stream: _Stream) -> None:
        """Its last reader has left."""
        if stream.task is None or stream.task.done():
            self._drop(name, stream)
        elif stream.held:
            pass  # It ends by itself, and leaves the stream to the others.
        elif stream.recorder is None:
            self._drop(name, stream)  # A reader that comes now begins anew.
            stream.task.cancel()
        elif stream.transcript.end is None:
            loop = asyncio.get_running_loop()
            if stream.grace is not None:
                stream.grace.cancel()  # of an earlier reader's leaving: this one has all of its own
            stream.grace = loop.call_later(self._config.grace_seconds, self._give_up, stream)

    def _give_up(self, stream: _Stream) -> None:
        if not stream.transcript.readers and stream.recorder is not None:
            stream.recorder.give_up()

    def _drop(self, name: StreamName, stream: _Stream) -> None:
        if stream.grace is not None:
            stream.grace.cancel()
        if self._known.get(name.id) is stream:
            del self._known[name.id]
