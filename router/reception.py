"""Reception: the one way in for a request, whichever protocol it came by."""

from __future__ import annotations

from cluster.config_clients import ClassesConfig
from router import validate
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.generation import Ask, Slo
from router.intake import Intake
from router.observe import Observer
from router.running import Running
from router.slo import slo_of
from router.tenants import Tenant


class Reception:
    """Checks who asks for what, and hands it to dispatch; takes note of what is refused."""

    def __init__(
        self,
        classes: ClassesConfig,
        catalog: Catalog,
        intake: Intake,
        dispatch: Dispatch,
        observer: Observer,
    ) -> None:
        self._classes = classes
        self._catalog = catalog
        self._intake = intake
        self._dispatch = dispatch
        self._observer = observer

    async def receive(self, tenant: Tenant, ask: Ask) -> Running:
        """Takes a request in. The caller consumes its deltas and calls `leave` in the end.

        Raises:
            PdserveError: it is refused.
        """
        slo: Slo | None = None
        try:
            timeout = validate.check_timeout(ask.timeout_seconds)
            slo = slo_of(self._classes, tenant, ask.urgency, timeout)
            self._dispatch.check_room(tenant.name, slo.slo_class)
            return self._dispatch.submit(await self._intake.prepare(ask, tenant, slo))
        except Exception as error:
            self.refused(tenant.name, ask.model, error, slo)
            raise

    def refused(
        self, tenant: str, model: str, error: BaseException, slo: Slo | None = None
    ) -> None:
        """Takes note of a request that did not come to be asked."""
        known = model if model in self._catalog.names else ""
        if not model and len(self._catalog.names) == 1:
            known = self._catalog.names[0]
        self._observer.refused(known, tenant, slo, error)
