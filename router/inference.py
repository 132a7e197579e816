"""The Inference service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.clock import Clock
from cluster.errors import PdserveError
from cluster.obs.logs import REQUEST_ID
from cluster.rpc.call import Call
from pdserve.v1 import inference_pb2, inference_pb2_grpc
from router import client_wire as wire
from router import validate
from router.answer import Answer
from router.caller import shown_by
from router.cancel import Canceller
from router.catalog import Catalog
from router.delta_wire import DeltaEncoder
from router.intake import Intake
from router.reception import Reception
from router.refusal import refuse, refusing
from router.tenants import Tenants


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Generate, Resume, Cancel, Tokenize and ListModels over gRPC."""

    def __init__(
        self,
        tenants: Tenants,
        catalog: Catalog,
        intake: Intake,
        reception: Reception,
        canceller: Canceller,
        clock: Clock,
        missing: Callable[[str], str],
    ) -> None:
        self._tenants = tenants
        self._catalog = catalog
        self._intake = intake
        self._reception = reception
        self._canceller = canceller
        self._clock = clock
        self._missing = missing

    @refusing
    async def Generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:
        received_at = self._clock.now()
        try:
            tenant = self._tenants.identify(shown_by(call))
            ask = wire.ask(request, received_at, call.time_remaining())
        except Exception as error:
            self._reception.refused("", request.model, error)
            raise
        await _answer(await self._reception.receive(tenant, ask), call)

    @refusing
    async def Resume(self, request: inference_pb2.ResumeRequest, call: Call) -> None:
        tenant = self._tenants.identify(shown_by(call))
        wire.refuse_unknown_fields(request)
        validate.check_timeout(call.time_remaining())
        answer = await self._reception.resume(tenant, request.request_id, request.next_offset)
        await _answer(answer, call)

    @refusing
    async def Cancel(
        self, request: inference_pb2.CancelRequest, call: Call
    ) -> inference_pb2.CancelResponse:
        tenant = self._tenants.identify(shown_by(call))
        wire.refuse_unknown_fields(request)
        request_id = validate.check_request_id(request.request_id)
        cancelled = await self._canceller.cancel(tenant.name, request_id)
        return inference_pb2.CancelResponse(cancelled=cancelled)

    @refusing
    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, call: Call
    ) -> inference_pb2.TokenizeResponse:
        self._tenants.identify(shown_by(call))
        validate.check_message_count(len(request.chat.messages))
        wire.refuse_unknown_fields(request)
        model = validate.check_model(request.model, self._catalog.names)
        token_ids = await self._intake.encode(model, wire.prompt(request))
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    @refusing
    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, call: Call
    ) -> inference_pb2.ListModelsResponse:
        self._tenants.identify(shown_by(call))
        wire.refuse_unknown_fields(request)
        models = []
        for name in self._catalog.names:
            limits = self._catalog.limits(name)
            plans_ahead, graph_tokens = self._catalog.planning(name)
            models.append(
                inference_pb2.Model(
                    name=name,
                    max_model_len=limits.max_model_len,
                    vocab_size=limits.vocab_size,
                    ready=not self._missing(name),
                    max_step_tokens=self._catalog.step_tokens(name),
                    plans_ahead=plans_ahead,
                    graph_tokens=graph_tokens,
                )
            )
        return inference_pb2.ListModelsResponse(models=models)


async def _answer(answer: Answer, call: Call) -> None:
    REQUEST_ID.set(answer.request_id)
    try:
        await _send(answer, call)
    finally:
        answer.leave()


async def _send(answer: Answer, call: Call) -> None:
    """Writes a request's deltas and its end; ends a write that blocks when the request is cut."""
    loop = asyncio.get_running_loop()
    request_id, encode = answer.request_id, DeltaEncoder(answer.request_id)
    try:
        async with asyncio.timeout(None) as limit:
            answer.on_cut = lambda: limit.reschedule(loop.time())
            answer.direct = lambda delta: call.try_write(encode(delta))
            async for deltas in answer.deltas():
                for delta in deltas:
                    await call.write_bytes(encode(delta))
            await call.write(wire.completed_message(request_id, answer.completed))
    except TimeoutError:
        await refuse(call, answer.error or PdserveError("cut without an error"))
    finally:
        answer.on_cut = answer.direct = None
