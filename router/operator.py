"""The Operator service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.errors import InvalidRequest, NotFound, PdserveError
from cluster.rpc.call import Call
from cluster.store.plans import Plans
from cluster.store.records import RouterRecord, WorkerRecord
from pdserve.v1 import operator_pb2, worker_pb2
from router.admission.offers import SloClass
from router.caller import shown_by
from router.client_wire import refuse_unknown_fields
from router.dispatch import Dispatch
from router.explain import explain_response
from router.lately import Quantiles, ServedLately
from router.placement import Target
from router.placer import Placer
from router.recording import Recording
from router.refusal import refusing
from router.steering import SteeringServicer
from router.tenants import Tenants
from router.validate import check_request_id
from router.workers import STORE_TIMEOUT_SECONDS, Registry, Workers

DESCRIBE_TIMEOUT_SECONDS = 2.0


class OperatorServicer(SteeringServicer):
    """GetCluster, from the registry and from the workers themselves; Explain, from placement."""

    def __init__(
        self,
        cluster: str,
        router: RouterRecord,
        workers: Workers,
        registry: Registry,
        dispatch: Dispatch,
        tenants: Tenants,
        placer: Placer,
        plans: Plans | None,
        models: list[str],
        recording: Recording,
        lately: Callable[[], ServedLately],
    ) -> None:
        super().__init__(plans, tenants, models, recording)
        self._placer = placer
        self._cluster = cluster
        self._router = router
        self._workers = workers
        self._registry = registry
        self._dispatch = dispatch
        self._tenants = tenants
        self._lately = lately

    @refusing
    async def GetCluster(
        self,
        request: operator_pb2.GetClusterRequest,
        call: Call,
    ) -> operator_pb2.GetClusterResponse:
        self._tenants.check_operator(shown_by(call))
        refuse_unknown_fields(request)
        if request.router_only:
            return operator_pb2.GetClusterResponse(
                cluster=self._cluster,
                routers=[self._own()],
                store_reachable=self._workers.store_reachable,
            )
        workers = await asyncio.gather(*map(self._worker, self._workers.records))
        waiting = await self._waiting({worker.worker_id for worker in workers})
        routers = await self._routers()
        return operator_pb2.GetClusterResponse(
            cluster=self._cluster,
            workers=[*workers, *waiting],
            routers=routers,
            store_reachable=self._workers.store_reachable,
        )

    @refusing
    async def Explain(
        self,
        request: operator_pb2.ExplainRequest,
        call: Call,
    ) -> operator_pb2.ExplainResponse:
        self._tenants.check_operator(shown_by(call))
        refuse_unknown_fields(request)
        by_tenant = self._placer.explain(check_request_id(request.request_id), request.tenant)
        if not by_tenant:
            of = f" of {request.tenant}" if request.tenant else ""
            raise NotFound(f"this router does not remember a request {request.request_id}{of}")
        if len(by_tenant) > 1:
            tenants = ", ".join(sorted(by_tenant))
            raise InvalidRequest("tenant", f"{tenants} each have a request of that id: name one")
        ((tenant, explained),) = by_tenant.items()
        return explain_response(tenant, explained)

    async def _waiting(self, registered: set[str]) -> list[operator_pb2.WorkerStatus]:
        """Those that are wanted and have not registered; none while the store is out."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                waiting = await self._kept_plans.waiting() if self._kept_plans else ()
        except (PdserveError, TimeoutError):
            waiting = ()
        return [
            operator_pb2.WorkerStatus(
                worker_id=each.worker_id,
                model=each.model,
                role=each.role,
                state=each.state,
                detail=each.detail,
            )
            for each in waiting
            if each.worker_id not in registered
        ]

    async def _routers(self) -> list[operator_pb2.RouterStatus]:
        """All that the store lists; this one alone while it is out."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                records = await self._registry.routers()
        except (PdserveError, TimeoutError):
            records = []
        others = [_addresses(r) for r in records if r.router_id != self._router.router_id]
        return [self._own(), *others]

    def _own(self) -> operator_pb2.RouterStatus:
        own = _addresses(self._router)
        own.running_requests = self._dispatch.running
        for slo_class in SloClass:
            own.queued_requests[slo_class.value] = self._dispatch.gate.queued(slo_class)
        own.lately.CopyFrom(_lately(self._lately()))
        return own

    async def _worker(self, record: WorkerRecord) -> operator_pb2.WorkerStatus:
        status = operator_pb2.WorkerStatus(
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            model=record.model,
            role=record.role,
            state=record.state,
            address=record.address,
            transport=record.transport,
            detail=record.detail,
        )
        link = self._workers.link(Target(record.worker_id, record.incarnation))
        if link is None or not link.connected:
            return status
        status.connected = True
        status.ejected = link.ejected
        try:
            _describe(status, await link.describe(DESCRIBE_TIMEOUT_SECONDS))
        except PdserveError as error:
            status.detail = status.detail or error.message
        return status


def _describe(status: operator_pb2.WorkerStatus, own: worker_pb2.WorkerDescription) -> None:
    status.running_sequences = own.running_sequences
    status.waiting_sequences = own.waiting_sequences
    status.done.CopyFrom(own.done)
    status.pinned_blocks = sum(entry.blocks for entry in own.ledger)
    status.pinned_bytes = sum(entry.bytes for entry in own.ledger)
    status.engine_blocks_used = own.engine_blocks_used
    status.engine_blocks_total = own.engine_blocks_total
    for process, resident in own.resident_bytes.items():
        status.resident_bytes[process] = resident


def _addresses(record: RouterRecord) -> operator_pb2.RouterStatus:
    return operator_pb2.RouterStatus(
        router_id=record.router_id,
        grpc_address=record.grpc_address,
        http_address=record.http_address,
        operator_address=record.operator_address or record.grpc_address,
    )


def _lately(served: ServedLately) -> operator_pb2.ServedLately:
    return operator_pb2.ServedLately(
        seconds=served.seconds,
        requests=served.requests,
        attained=served.attained,
        missed=served.missed,
        ttft_seconds=_quantiles(served.ttft),
        tpot_seconds=_quantiles(served.tpot),
    )


def _quantiles(seconds: Quantiles | None) -> operator_pb2.Quantiles | None:
    if seconds is None:
        return None
    return operator_pb2.Quantiles(p50=seconds.p50, p90=seconds.p90, p99=seconds.p99)
