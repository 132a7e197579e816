"""Intake: from what a caller asks to a generation that passed every check."""

from __future__ import annotations

from cluster.clock import Clock
from cluster.errors import DeadlineExceeded
from cluster.ids import new_request_id
from router import validate
from router.catalog import Catalog
from router.generation import Ask, Generation, Prompt, Slo
from router.tenants import Tenant


class Intake:
    """Checks and tokenises."""

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog = catalog
        self._clock = clock

    async def prepare(self, ask: Ask, tenant: Tenant, slo: Slo) -> Generation:
        """The generation that the tenant's `ask` means; cheap checks come before tokenising.

        Raises:
            InvalidRequest, NotFound, DeadlineExceeded: as `router.validate` says.
            Unavailable: the model's limits are not known yet.
        """
        timeout = validate.check_timeout(ask.timeout_seconds)
        deadline = ask.received_at + timeout
        given = ask.request_id or ask.suggested_id
        request_id = validate.check_request_id(given) if given else new_request_id()
        validate.check_cache_salt(ask.cache_salt)
        validate.check_publish_after(ask.publish_after)
        model = validate.check_model(ask.model, self._catalog.names)
        limits = self._catalog.limits(model)
        validate.check_sampling(ask.sampling, limits)
        token_ids = await self.encode(model, ask.prompt)
        validate.check_prompt(token_ids, limits, prompt_field(ask.prompt))
        sampling = validate.resolve_max_tokens(
            ask.sampling, len(token_ids), limits, ask.default_max_tokens
        )
        if self._clock.now() >= deadline:
            raise DeadlineExceeded("the deadline passed while the prompt was tokenised")
        return Generation(
            request_id,
            model,
            token_ids,
            sampling,
            tenant.cache_salt(ask.cache_salt),
            ask.received_at,
            deadline,
            tenant.name,
            slo,
            ask.publish_after,
        )

    async def encode(self, model: str, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids; `model` is a known name. Raises InvalidRequest."""
        if prompt.chat is not None:
            validate.check_chat(prompt.chat)
        return await self._catalog.encode(model, prompt)


def prompt_field(prompt: Prompt) -> str:
    """The field of GenerateRequest that the prompt came in."""
    if prompt.token_ids is not None:
        return "token_ids"
    return "text" if prompt.chat is None else "chat"
