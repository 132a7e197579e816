"""The part of the configuration that is about clients: who they are and what they may ask.

Secrets never stand in it: a field names the file or the environment variable that holds them, one
a line, so that a new one can be added before the old one goes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config_models import Section
from cluster.errors import ConfigError

SloClassName = Literal["interactive", "standard", "batch"]
MIN_TOKEN_CHARS = 16


class CredentialsConfig(Section):
    """What a caller shows: a bearer token, or a client certificate."""

    token_file: Annotated[
        Path | None, Field(description="Holds bearer tokens, one a line, on the routers' hosts.")
    ] = None
    token_env: Annotated[
        str | None, Field(description="Names an environment variable of the routers with them.")
    ] = None
    identities: Annotated[
        list[str],
        Field(description="Common or subject alternative names of client certificates (mTLS)."),
    ] = []

    @property
    def given(self) -> bool:
        return bool(self.token_file or self.token_env or self.identities)

    def beside(self, folder: Path) -> Self:
        """Its file relative to the folder of the configuration."""
        if self.token_file is None:
            return self
        return self.model_copy(update={"token_file": folder / self.token_file})

    def tokens(self, field: str) -> list[str]:
        """Reads the tokens.

        Args:
            field: the section's path in the configuration, for errors.

        Raises:
            ConfigError: the file or the variable cannot be read, or a token is too short.
        """
        lines: list[str] = []
        if self.token_file is not None:
            try:
                lines += self.token_file.read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not text"
                raise ConfigError(
                    f"{field}.token_file: {self.token_file} cannot be read: {why}"
                ) from None
            if not lines:
                raise ConfigError(f"{field}.token_file: {self.token_file} holds no token")
        if self.token_env is not None:
            if not os.environ.get(self.token_env, "").split():
                raise ConfigError(f"{field}.token_env: {self.token_env} is not set on this host")
            lines += os.environ[self.token_env].split()
        if any(len(token) < MIN_TOKEN_CHARS for token in lines):
            raise ConfigError(
                f"{field}: a token has less than {MIN_TOKEN_CHARS} characters; draw one with "
                "`openssl rand -hex 32`"
            )
        return lines


class LimitsConfig(Section):
    """What a tenant may ask of the whole cluster; unset: no limit of its own."""

    requests_per_second: Annotated[
        float | None, Field(gt=0, description="In the long run; more is refused.")
    ] = None
    tokens_per_second: Annotated[
        float | None, Field(gt=0, description="Prompt and output together; more is refused.")
    ] = None
    burst_seconds: Annotated[
        float, Field(gt=0, description="So many seconds' worth may come at once after a pause.")
    ] = 10.0
    max_running_requests: Annotated[int | None, Field(ge=1, description="At once; more wait.")] = (
        None
    )
    max_queued_requests: Annotated[
        int | None, Field(ge=1, description="Waiting; more are refused.")
    ] = None
    batch_jobs: Annotated[
        int | None, Field(ge=1, description="Batch jobs that have not ended; more are refused.")
    ] = 100


class TenantConfig(CredentialsConfig):
    """One tenant: its credentials, its share and its limits. No two share a cache."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="In metrics and logs."),
    ]
    weight: Annotated[
        float, Field(gt=0, le=1000, description="Its share where tenants compete.")
    ] = 1.0
    classes: Annotated[
        list[SloClassName], Field(min_length=1, description="What it may ask for.")
    ] = ["interactive", "standard", "batch"]
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _has_credentials(self) -> TenantConfig:
        if not self.given:
            raise ValueError("needs token_file, token_env or identities: nobody could be it")
        return self


class ClassConfig(Section):
    """The targets of one class of requests, where a request brings none of its own."""

    ttft_seconds: Annotated[
        float | None,
        Field(gt=0, description="Time to first token; a request that cannot make it is refused."),
    ] = None
    tpot_seconds: Annotated[float | None, Field(gt=0, description="Time per output token.")] = None
    patience_seconds: Annotated[
        float | None,
        Field(gt=0, description="Longest time without a start while more urgent work comes."),
    ] = None


class ClassesConfig(Section):
    """The classes of requests, most urgent first, and which class a request is of."""

    interactive: ClassConfig = ClassConfig(ttft_seconds=2.0, tpot_seconds=0.1)
    standard: ClassConfig = ClassConfig(ttft_seconds=30.0, tpot_seconds=0.5, patience_seconds=5.0)
    batch: ClassConfig = ClassConfig(patience_seconds=60.0)
    interactive_deadline_seconds: Annotated[
        float,
        Field(gt=0, description="A request without a class is interactive up to this deadline."),
    ] = 15.0
    batch_share: Annotated[
        float, Field(gt=0, le=1, description="Of the capacity, that batch work may fill.")
    ] = 0.8


class ResumeConfig(Section):
    """Requests that can be resumed: those with an idempotency key, or that ask for it."""

    window_seconds: Annotated[
        float, Field(gt=0, le=86400, description="A finished one can be replayed for so long.")
    ] = 600.0
    grace_seconds: Annotated[
        float, Field(ge=0, description="A running one waits so long for its client to come back.")
    ] = 30.0


class BatchConfig(Section):
    """Batch jobs: how much of them at once, and how long they are kept."""

    max_running_lines: Annotated[
        int, Field(ge=16, description="Lines that a router has in hand at once.")
    ] = 128
    max_file_bytes: Annotated[int, Field(ge=1024, description="Largest input, bytes.")] = 64 << 20
    max_lines: Annotated[int, Field(ge=1, description="Lines of an input.")] = 100_000
    max_stored_bytes: Annotated[
        int, Field(ge=1024, description="Inputs and results that the store holds, bytes.")
    ] = 256 << 20
    completion_window_seconds: Annotated[
        float, Field(gt=0, description="A job that takes longer ends as expired.")
    ] = 86400.0
    keep_seconds: Annotated[
        float, Field(gt=0, description="An ended job and its results are kept for so long.")
    ] = 7 * 86400.0


class TlsConfig(Section):
    """TLS of the routers' ports."""

    cert_file: Annotated[Path, Field(description="The chain, PEM.")]
    key_file: Annotated[Path, Field(description="Its key, PEM.")]
    client_ca_file: Annotated[
        Path | None,
        Field(
            description="Clients must show a certificate signed by it, PEM; unset: none is asked."
        ),
    ] = None

    def beside(self, folder: Path) -> TlsConfig:
        """Its files relative to the folder of the configuration."""
        ca = self.client_ca_file
        files = {"cert_file": folder / self.cert_file, "key_file": folder / self.key_file}
        return self.model_copy(update={**files, "client_ca_file": ca and folder / ca})


def check_callers(
    tenants: Sequence[TenantConfig], operator: CredentialsConfig, tls: TlsConfig | None
) -> None:
    """Raises ValueError if one caller could be two, or certificates could not be checked."""
    names = [tenant.name for tenant in tenants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tenants: {', '.join(twice)} is named twice")
    shown = [identity for one in (*tenants, operator) for identity in one.identities]
    if twice := sorted({identity for identity in shown if shown.count(identity) > 1}):
        raise ValueError(f"identities: {', '.join(twice)} would be two callers")
    if shown and (tls is None or tls.client_ca_file is None):
        raise ValueError("identities: need router.tls.client_ca_file to check certificates")
