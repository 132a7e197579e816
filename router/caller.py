"""What a gRPC caller shows of itself."""

from __future__ import annotations

from typing import Any

import grpc

from router.tenants import Shown


def shown_by(context: grpc.aio.ServicerContext[Any, Any]) -> Shown:
    """Its Authorization metadata, and the names in its client certificate, which gRPC verified."""
    metadata = dict(context.invocation_metadata() or ())
    peer = context.auth_context() or {}
    names = [
        name.decode(errors="replace")
        for kind in ("x509_common_name", "x509_subject_alternative_name")
        for name in peer.get(kind, ())
    ]
    header = metadata.get("authorization")
    return Shown.from_header(header if isinstance(header, str) else None, names)
