"""What a gRPC caller shows of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.rpc.call import Call
from router.tenants import Shown


def shown_by(call: Call) -> Shown:
    """Its Authorization metadata, and the names in its client certificate, which TLS verified."""
    header = dict(call.invocation_metadata()).get("authorization")
    return Shown.from_header(header if isinstance(header, str) else None, call.peer_names)


def certificate_names(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """The common names and the alternative names, as Python's ssl tells them."""
    common = [
        value
        for attributes in certificate.get("subject", ())
        for kind, value in attributes
        if kind == "commonName"
    ]
    return (*common, *(value for _, value in certificate.get("subjectAltName", ())))
