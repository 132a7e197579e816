"""TLS of the two ports. With a client CA both ask every client for a certificate signed by it."""

from __future__ import annotations

import ssl
from pathlib import Path

from cluster.config_clients import TlsConfig
from cluster.errors import ConfigError


def grpc_context(tls: TlsConfig) -> ssl.SSLContext:
    """Raises ConfigError if a file cannot be read or used."""
    context = http_context(tls)
    context.set_alpn_protocols(["h2"])
    return context


def http_context(tls: TlsConfig) -> ssl.SSLContext:
    """Raises ConfigError if a file cannot be read or used."""
    _read(tls.cert_file, "cert_file"), _read(tls.key_file, "key_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"router.tls: {tls.cert_file} and {tls.key_file} are no certificate and its key, PEM"
        ) from error
    if tls.client_ca_file is not None:
        _read(tls.client_ca_file, "client_ca_file")
        try:
            context.load_verify_locations(tls.client_ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"router.tls.client_ca_file: {tls.client_ca_file} holds no certificate, PEM"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"router.tls.{field}: {path} cannot be read: {error.strerror}") from error
