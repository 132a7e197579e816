"""The HTTP application: routes, errors, health, metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from cluster.errors import PdserveError
from router import validate
from router.catalog import Catalog
from router.http.failures import error_body, response_of
from router.http.generate import GenerateHandlers
from router.http.headers import shown_by
from router.tenants import Tenants

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpApp:
    """Builds the application.

    Args:
        not_ready: why requests cannot be served now; empty if they can.
        max_body: bytes.
        more: routes beside its own.
    """

    def __init__(
        self,
        generate: GenerateHandlers,
        tenants: Tenants,
        catalog: Catalog,
        registry: CollectorRegistry,
        not_ready: Callable[[], str],
        max_body: int,
        more: Iterable[web.RouteDef] = (),
    ) -> None:
        self._tenants = tenants
        self._catalog = catalog
        self._registry = registry
        self._not_ready = not_ready
        self._started = int(time.time())
        self._max_body = max_body
        self.app = web.Application(client_max_size=max_body, middlewares=[self._errors])
        self.app.add_routes(
            [
                web.post("/v1/completions", generate.completions),
                web.post("/v1/chat/completions", generate.chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                *more,
            ]
        )

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in OpenAI's shape."""
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body must be at most {self._max_body} bytes"
            return _plain(413, text, "request_too_large")
        except web.HTTPMethodNotAllowed as error:
            response = _plain(405, f"{request.method} is not allowed here", "method_not_allowed")
            response.headers["Allow"] = error.headers["Allow"]
            return response
        except web.HTTPNotFound:
            return _plain(404, f"there is no {request.path[:200]}", "not_found")
        except web.HTTPException as error:
            return _plain(error.status, error.reason, None)
        except Exception as error:
            return response_of(error)

    async def _models(self, request: web.Request) -> web.Response:
        self._tenants.identify(shown_by(request))
        cards = [self._card(name) for name in self._catalog.names]
        return web.json_response({"object": "list", "data": cards})

    async def _model(self, request: web.Request) -> web.Response:
        self._tenants.identify(shown_by(request))
        name = validate.check_model(request.match_info["name"], self._catalog.names)
        return web.json_response(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        card: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "pdserve",
        }
        with contextlib.suppress(PdserveError):
            card["max_model_len"] = self._catalog.limits(name).max_model_len
        return card

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = self._not_ready()
        if reason:
            return web.json_response({"status": "not ready", "reason": reason}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _plain(status: int, message: str, code: str | None) -> web.Response:
    return web.json_response(error_body(status, message, None, code), status=status)
