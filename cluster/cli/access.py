"""How the CLI opens a channel to a router: credentials and certificates come from the environment.

PDSERVE_TOKEN        the bearer token, of a tenant or of the operator
PDSERVE_CA_FILE      what the router's certificate is checked against; with it TLS is spoken
PDSERVE_CERT_FILE    the client's own certificate and key, where the router asks for one
PDSERVE_KEY_FILE
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cluster.errors import ConfigError

MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)


def channel(address: str, token: str = "", ours: bool = False) -> grpc.aio.Channel:
    """A channel to a router; the caller closes it.

    Args:
        token: in place of PDSERVE_TOKEN where that is not set.
        ours: in place of PDSERVE_TOKEN at any rate: that one may be a tenant's.

    Raises:
        ConfigError: a file cannot be read.
    """
    given = os.environ.get("PDSERVE_TOKEN", "")
    token = (token or given) if ours else (given or token)
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if token:
        interceptors += [_Unary(token), _Stream(token), _Upload(token)]
    ca = _file("PDSERVE_CA_FILE")
    if ca is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(
        ca, _file("PDSERVE_KEY_FILE"), _file("PDSERVE_CERT_FILE")
    )
    return grpc.aio.secure_channel(
        address, credentials, options=_OPTIONS, interceptors=interceptors
    )


def tls() -> ssl.SSLContext | None:
    """What `channel` speaks, for a connection of `cluster.rpc`; None without PDSERVE_CA_FILE.

    Raises:
        ConfigError: a file cannot be read, or is none of its kind.
    """
    if _file("PDSERVE_CA_FILE") is None:
        return None
    certificate, key = _file("PDSERVE_CERT_FILE"), _file("PDSERVE_KEY_FILE")
    try:
        context = ssl.create_default_context(cafile=os.environ["PDSERVE_CA_FILE"])
        if certificate is not None and key is not None:
            context.load_cert_chain(os.environ["PDSERVE_CERT_FILE"], os.environ["PDSERVE_KEY_FILE"])
    except ssl.SSLError as error:
        raise ConfigError(
            f"PDSERVE_CA_FILE, PDSERVE_CERT_FILE, PDSERVE_KEY_FILE: not PEM: {error}"
        ) from error
    context.set_alpn_protocols(["h2"])
    return context


def credentials() -> tuple[tuple[str, str], ...]:
    """The metadata that shows PDSERVE_TOKEN; empty without one."""
    token = os.environ.get("PDSERVE_TOKEN", "")
    return (("authorization", f"Bearer {token}"),) if token else ()


class _Authorized:
    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _with_header(self, details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return details._replace(metadata=metadata)


class _Unary(_Authorized, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        return await continuation(self._with_header(details), request)


class _Stream(_Authorized, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        return await continuation(self._with_header(details), request)


class _Upload(_Authorized, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, requests: Any
    ) -> Any:
        return await continuation(self._with_header(details), requests)


def _file(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{variable}: {path} cannot be read: {error.strerror}") from error
