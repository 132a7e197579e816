"""Who a caller is: a tenant, by bearer token or by the identity in its client certificate."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.config import Config
from cluster.config_clients import CredentialsConfig
from cluster.errors import ConfigError, Unauthenticated
from router.admission.offers import SloClass
from router.generation import DEFAULT_TENANT

MAX_TOKEN_CHARS = 4096


@dataclass(frozen=True)
class Shown:
    """What a caller shows of itself.

    Attributes:
        token: the bearer token; None: it sent none.
        identities: names in its verified client certificate.
    """

    token: str | None = None
    identities: tuple[str, ...] = ()

    @classmethod
    def from_header(cls, authorization: str | None, identities: Iterable[str] = ()) -> Shown:
        """Of an Authorization header."""
        scheme, _, token = (authorization or "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else None
        return cls(bearer, tuple(identities))


@dataclass(frozen=True)
class Tenant:
    """Whose request it is.

    Attributes:
        classes: that it may ask for.
        salt_key: what its cache salts are made under; empty: callers' salts are taken as they are.
        batch_jobs: that it may have unfinished; infinite where there is no limit.
    """

    name: str = DEFAULT_TENANT
    classes: frozenset[SloClass] = frozenset(SloClass)
    salt_key: bytes = b""
    batch_jobs: float = math.inf

    def cache_salt(self, own: str) -> str:
        """The salt of its requests with the salt `own`: no other tenant can arrive at it."""
        if not self.salt_key:
            return own
        return hmac.new(self.salt_key, own.encode(), hashlib.sha256).hexdigest()[:32]


class _Keyring:
    """Credentials of one caller. Tokens are kept as digests, which all have the same length."""

    def __init__(self, config: CredentialsConfig, field: str) -> None:
        self.digests = [_digest(token) for token in config.tokens(field)]
        self.identities = frozenset(config.identities)

    def opens(self, digest: bytes | None, identities: Sequence[str]) -> bool:
        """Looks at every token, so that time tells nothing of which one came close."""
        matches = [hmac.compare_digest(digest or b"", mine) for mine in self.digests]
        return any(matches) or not self.identities.isdisjoint(identities)


class Tenants:
    """The callers of a cluster. Without tenants in the configuration everyone is `default`.

    Args:
        secret: the cluster's.
        operator_token: one more that opens the Operator API: the cluster's own tools have it.

    Raises:
        ConfigError: credentials cannot be read, or two callers have the same token.
    """

    def __init__(self, config: Config, secret: bytes, operator_token: str) -> None:
        self._secret, self._operator_token = secret, operator_token
        self.reload(config)

    def reload(self, config: Config) -> None:
        """Other callers, or the same with what their files and variables hold now. Errors as of
        the class; then nothing has changed."""
        tenants: dict[str, Tenant] = {}
        keyrings: dict[str, _Keyring] = {}
        for tenant in config.tenants:
            keyrings[tenant.name] = _Keyring(tenant, f"tenants.{tenant.name}")
            name = b"pdserve tenant\0" + tenant.name.encode()
            key = hmac.new(self._secret, name, hashlib.sha256)
            classes = frozenset(map(SloClass, tenant.classes))
            jobs = tenant.limits.batch_jobs or math.inf
            tenants[tenant.name] = Tenant(tenant.name, classes, key.digest(), jobs)
        operator = _Keyring(config.operator, "operator")
        operator.digests.append(_digest(self._operator_token))
        digests = [d for ring in (*keyrings.values(), operator) for d in ring.digests]
        if len(set(digests)) < len(digests):
            raise ConfigError("tenants: two callers have the same token; give each its own")
        self._tenants, self._keyrings, self._operator = tenants, keyrings, operator
        # A port of its own is there to keep others out, and loopback does so already.
        apart = config.router.operator_port is not None and not _is_loopback(config.router.host)
        self._guarded = bool(config.tenants) or config.operator.given or apart

    @property
    def open(self) -> bool:
        """Nobody needs credentials."""
        return not self._tenants

    def named(self, name: str) -> Tenant | None:
        """The tenant called `name`, if there still is one."""
        if self.open:
            return Tenant() if name == DEFAULT_TENANT else None
        return self._tenants.get(name)

    def identify(self, shown: Shown) -> Tenant:
        """The tenant that the caller is. Raises Unauthenticated."""
        if self.open:
            return Tenant()
        digest = _digest_of(shown)
        found = [
            name for name, ring in self._keyrings.items() if ring.opens(digest, shown.identities)
        ]
        if not found:
            raise _refusal(shown)
        return self._tenants[found[0]]

    def check_steering(self, shown: Shown) -> None:
        """Raises Unauthenticated unless the caller may change the cluster, or read its requests'
        lengths: without credentials nobody may, whoever else is let in."""
        if not self._operator.opens(_digest_of(shown), shown.identities):
            if shown.token is None and not shown.identities:
                raise Unauthenticated(
                    "this call needs the operator's credentials: run it where the cluster runs, or "
                    "configure `operator` and set PDSERVE_TOKEN"
                )
            raise _refusal(shown)

    def check_operator(self, shown: Shown) -> None:
        """Raises Unauthenticated unless the caller may call the Operator API."""
        if self._guarded:
            self.check_steering(shown)


def _is_loopback(host: str | None) -> bool:
    if host in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False  # an interface's name


def _digest(token: str) -> bytes:
    # HTTP's headers may hold what is no text, as lone surrogates.
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _digest_of(shown: Shown) -> bytes | None:
    if shown.token is None or len(shown.token) > MAX_TOKEN_CHARS:
        return None
    return _digest(shown.token)


def _refusal(shown: Shown) -> Unauthenticated:
    if shown.token is None and not shown.identities:
        return Unauthenticated(
            "credentials are required: send `Authorization: Bearer TOKEN`, or a client certificate"
        )
    return Unauthenticated("the credentials are not those of a caller of this cluster")
