"""Reception: the one way in for a request, whichever protocol it came by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.config_clients import ClassesConfig
from cluster.ids import new_request_id
from router import validate
from router.answer import Answer
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.generation import Ask, Generation, Slo
from router.intake import Intake
from router.observe import Observer
from router.resume.service import Resumption
from router.slo import slo_of
from router.tenants import Tenant
from router.turns import Turns


class Reception:
    """Checks who asks for what, and hands it to dispatch; takes note of what is refused."""

    def __init__(
        self,
        classes: ClassesConfig,
        catalog: Catalog,
        intake: Intake,
        dispatch: Dispatch,
        resumption: Resumption,
        observer: Observer,
    ) -> None:
        self._classes = classes
        self._catalog = catalog
        self._intake = intake
        self._dispatch = dispatch
        self._resumption = resumption
        self._observer = observer
        self._turns = Turns()

    def set_classes(self, classes: ClassesConfig) -> None:
        """For the requests that come from now on."""
        self._classes = classes

    async def receive(self, tenant: Tenant, ask: Ask) -> Answer:
        """Takes a request in. The caller consumes its deltas and calls `leave` in the end.

        Raises:
            PdserveError: it is refused.
        """
        slo: Slo | None = None
        await self._turns.take()
        try:
            timeout = validate.check_timeout(ask.timeout_seconds)
            slo = slo_of(self._classes, tenant, ask.urgency, timeout)
            self._dispatch.check_room(tenant.name, slo.slo_class)
            validate.check_idempotency_key(ask.idempotency_key)
            generation = await self._intake.prepare(ask, tenant, slo)
            try:
                return await self._begin(ask, generation)
            except validate.RequestIdTaken:
                if ask.request_id:
                    raise
                return await self._begin(ask, replace(generation, request_id=new_request_id()))
        except Exception as error:
            self.refused(tenant.name, ask.model, error, slo)
            raise

    async def _begin(self, ask: Ask, generation: Generation) -> Answer:
        if ask.resumable or ask.idempotency_key:
            return await self._resumption.begin(generation, ask.idempotency_key)
        return self._dispatch.submit(generation)

    async def resume(self, tenant: Tenant, request_id: str, next_offsets: Sequence[int]) -> Answer:
        """As `Resumption.resume`."""
        validate.check_request_id(request_id)
        return await self._resumption.resume(tenant.name, request_id, next_offsets)

    def refused(
        self, tenant: str, model: str, error: BaseException, slo: Slo | None = None
    ) -> None:
        """Takes note of a request that did not come to be asked."""
        known = model if model in self._catalog.names else ""
        if not model and len(self._catalog.names) == 1:
            known = self._catalog.names[0]
        self._observer.refused(known, tenant, slo, error)
