"""The two endpoints that generate, streaming and not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import ClientConnectionResetError, HttpVersion11, web
from pydantic import ValidationError

from cluster.clock import Clock
from cluster.errors import DeadlineExceeded, PdserveError
from cluster.ids import REQUEST_ID_PATTERN
from cluster.obs.logs import REQUEST_ID
from router.answer import Answer
from router.http.bodies import ChatBody, CompletionBody
from router.http.failures import body_of, refuse_body
from router.http.headers import IDEMPOTENCY_HEADER, seconds, shown_by, urgency
from router.http.replies import ChatReply, CompletionReply, event
from router.output import Delta, joined
from router.reception import Reception
from router.tenants import Tenants

TIMEOUT_HEADER = "X-Request-Timeout-Seconds"
REQUEST_ID_HEADER = "X-Request-Id"
DIRECT_BYTES = 4096
"""That may wait in a client's socket for its next token to go there at once."""

STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class GenerateHandlers:
    """POST /v1/completions and /v1/chat/completions.

    Args:
        default_timeout: seconds, of requests without the timeout header.
    """

    def __init__(
        self,
        tenants: Tenants,
        reception: Reception,
        clock: Clock,
        default_timeout: float,
    ) -> None:
        self._tenants = tenants
        self._reception = reception
        self._clock = clock
        self._default_timeout = default_timeout

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, CompletionBody, CompletionReply)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, ChatBody, ChatReply)

    async def _handle(
        self,
        request: web.Request,
        kind: type[CompletionBody] | type[ChatBody],
        reply_kind: type[CompletionReply],
    ) -> web.StreamResponse:
        received_at = self._clock.now()
        try:
            tenant = self._tenants.identify(shown_by(request))
            timeout = self._timeout(request)
            body = _parse(kind, await _read(request, timeout))
            asked = replace(
                body.asked(received_at, timeout, ""),
                suggested_id=_header_id(request),
                urgency=urgency(request.headers),
                idempotency_key=request.headers.get(IDEMPOTENCY_HEADER, ""),
            )
        except PdserveError as error:
            self._reception.refused("", "", error)
            raise
        answer = await self._reception.receive(tenant, asked)
        REQUEST_ID.set(answer.request_id)
        reply = reply_kind(answer.request_id, answer.model, int(time.time()), body.include_usage)
        try:
            if body.stream:
                return await _stream(request, answer, reply)
            return await _whole(answer, reply)
        finally:
            answer.leave()

    def _timeout(self, request: web.Request) -> float:
        return seconds(request.headers, TIMEOUT_HEADER) or self._default_timeout


async def _read(request: web.Request, timeout: float) -> bytes:
    """The body. Raises DeadlineExceeded if all of it has not come after `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            return await request.read()
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before all of the body had come") from None


def _parse(kind: type[CompletionBody] | type[ChatBody], raw: bytes) -> CompletionBody | ChatBody:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise refuse_body(error) from None


def _header_id(request: web.Request) -> str:
    """The caller's id. Proxies put ids of any shape there, and the same for all that one request of
    theirs leads to: a strange one, or another request's, is only passed over."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID_PATTERN.fullmatch(given) else ""


async def collect(answer: Answer, reply: CompletionReply) -> dict[str, Any]:
    """The whole reply, once it is there. Raises PdserveError."""
    deltas: dict[int, list[Delta]] = {}
    async for batch in answer.deltas():
        for delta in batch:
            deltas.setdefault(delta.index, []).append(delta)
    choices = [joined(deltas[index]) for index in sorted(deltas)]
    return reply.whole(choices, answer.completed)


async def _whole(answer: Answer, reply: CompletionReply) -> web.Response:
    body = await collect(answer, reply)
    return web.json_response(body, headers={REQUEST_ID_HEADER: answer.request_id})


async def _stream(
    request: web.Request, answer: Answer, reply: CompletionReply
) -> web.StreamResponse:
    batches = answer.deltas()
    # Nothing is answered before the first token, so that an error until then has its own status.
    first = await anext(batches)
    headers = {**STREAM_HEADERS, REQUEST_ID_HEADER: answer.request_id}
    response = web.StreamResponse(headers=headers)
    write = _interruptible(answer, response.write)
    try:
        await response.prepare(request)
        await write(reply.opening(answer.n) + _chunks(reply, first))
        if request.version >= HttpVersion11 and request.transport is not None:
            answer.direct = _direct(request.transport, reply)
        try:
            async for batch in batches:
                await write(_chunks(reply, batch))
            await write(reply.closing(answer.completed))
        except PdserveError as error:
            _, body = body_of(error)
            await write(event(body))
        await response.write_eof()
    except TimeoutError:
        # The client does not read: nothing can be said to it any more.
        if request.transport is not None:
            request.transport.abort()
    except ClientConnectionResetError:
        pass
    finally:
        answer.direct = None
    return response


def _direct(transport: asyncio.Transport, reply: CompletionReply) -> Callable[[Delta], bool]:
    """Writes a delta as a chunk of HTTP/1.1, past aiohttp's writer, while the socket keeps up."""

    def send(delta: Delta) -> bool:
        if transport.is_closing() or transport.get_write_buffer_size() > DIRECT_BYTES:
            return False
        data = reply.chunk(delta)
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return send


def _chunks(reply: CompletionReply, batch: list[Delta]) -> bytes:
    return b"".join(map(reply.chunk, batch))


def _interruptible(
    answer: Answer, write: Callable[[bytes], Awaitable[None]]
) -> Callable[[bytes], Awaitable[None]]:
    """`write`, ended by TimeoutError when the request is cut off while it blocks."""
    loop = asyncio.get_running_loop()

    async def wrapped(data: bytes) -> None:
        async with asyncio.timeout(None) as limit:
            answer.on_cut = lambda: limit.reschedule(loop.time())
            try:
                await write(data)
            finally:
                answer.on_cut = None

    return wrapped
