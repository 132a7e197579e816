"""Which transport an engine rank uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError
from cluster.kv.doorkeeper import Terms
from cluster.kv.paged import PagedCache
from cluster.kv.transport.grpc import GrpcTransport
from cluster.kv.transport.link import LinkTerms
from cluster.kv.transport.nccl import NcclTransport, nccl_available
from cluster.kv.transport.seam import Transport
from cluster.ports import ANY
from cluster.ticket import TicketSigner

Choice = Literal["auto", "grpc", "nccl"]


@dataclass(frozen=True)
class TransportOptions:
    """`handoff` in the configuration, as far as it is about transports.

    Attributes:
        host: interface of the transfer port.
        max_message_bytes: largest frame over gRPC, unless a block is larger.
        max_streams: pushes received at once.
        ports: the transfer port is one of them.
        link_checksums: every how many payloads over NCCL are checked; 0: none.
        link_seconds: how long a link may stand still before it is taken for dead.
        link_max_ctas: thread blocks of the GPU that a transfer by kernels may take; None: NCCL
            decides.
        link_bytes: device memory that a link takes at most.
    """

    transport: Choice
    host: str
    max_message_bytes: int
    max_streams: int
    ports: str = ANY
    link_checksums: int = 1
    link_seconds: float = 10.0
    link_max_ctas: int | None = None
    link_bytes: int = 1 << 30


def make_transport(
    options: TransportOptions, cache: PagedCache, signer: TicketSigner, terms: Terms
) -> Transport:
    """`auto` takes NCCL where this rank can; a push still goes over gRPC when its peer cannot.

    Raises:
        ConfigError: NCCL is asked for where there is none.
    """
    message_bytes = max(options.max_message_bytes, cache.block_bytes)
    unavailable = nccl_available(cache)
    if options.transport == "nccl" and unavailable:
        raise ConfigError(
            f"handoff.transport: nccl is not possible here: {unavailable}; use auto or grpc"
        )
    grpc = GrpcTransport(
        options.host, message_bytes, options.max_streams, cache=cache, ports=options.ports
    )
    if options.transport == "grpc" or unavailable:
        return grpc
    return NcclTransport(
        grpc,
        cache,
        signer,
        terms,
        required=options.transport == "nccl",
        checksums=options.link_checksums,
        links=LinkTerms(
            cache.device, options.link_seconds, options.link_max_ctas, options.link_bytes
        ),
    )
