"""Which address of this host a server listens on."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

from cluster.errors import ConfigError

WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - recognised, and refused where it matters

Interfaces = Mapping[str, Sequence[str]]
"""Addresses by name."""


class InterfaceMissing(ConfigError):
    """The host has no such interface."""


def here() -> Interfaces:
    """This host's."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def choose(
    field: str, spec: str | None, own: str, interfaces: Interfaces, wildcard: bool = False
) -> str:
    """The address that `spec` means on a host with these interfaces.

    Args:
        field: of the configuration, for errors.
        spec: an interface's name, an address or a network; None means `own`.
        own: the host's address among the cluster's hosts.
        wildcard: `spec` may be 0.0.0.0, which is returned as it is.

    Raises:
        InterfaceMissing: the host has no such interface.
    """
    if spec is None:
        return own
    if spec in WILDCARDS:
        if wildcard:
            return spec
        raise InterfaceMissing(
            f"{field}: {spec} is every interface, and others must know the one to connect to: "
            "name an interface, or a network such as 10.0.0.0/8"
        )
    if addresses := interfaces.get(spec):
        return min(addresses, key=lambda address: ":" in address)  # IPv4 first
    addresses = [address for of in interfaces.values() for address in of]
    try:
        network = ipaddress.ip_network(spec, strict=False)
    except ValueError:
        network = None
    if network is None and spec == "localhost":
        return spec
    for address in addresses:
        if network is not None and ipaddress.ip_address(address) in network:
            return address
    known = ", ".join(f"{name} ({', '.join(of)})" for name, of in interfaces.items() if of)
    raise InterfaceMissing(f"{field}: this host has no interface {spec}; it has {known}")
