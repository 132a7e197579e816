"""Which TCP ports a server may take – one, a range, or any free one – and taking one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from cluster.errors import ConfigError

ANY = "0"


def candidates(ports: str) -> Iterable[int]:
    """The ports to try, in order; 0 is the system's choice."""
    first, _, last = ports.partition("-")
    return range(int(first), int(last or first) + 1)


def take(bind: Callable[[str, int], int], host: str, ports: str, fields: str) -> str:
    """Binds the first of `ports` that is free; the address, as host:port.

    Args:
        bind: of a host and a port; the port taken. Raises OSError or RuntimeError, or returns 0, if
            it cannot be.
        fields: the configuration's fields behind `host` and `ports`, for the error.

    Raises:
        ConfigError: none is free, or the host has no such address.
    """
    shown = f"[{host}]" if ":" in host else host
    why = ""
    for port in candidates(ports):
        try:
            if taken := bind(shown, port):
                return f"{shown}:{taken}"
        except (OSError, RuntimeError) as error:
            why = str(error).splitlines()[0]
    what = "any port" if ports == ANY else f"port {ports}"
    raise ConfigError(
        f"{fields}: cannot listen on {what} of {shown}: in use, or not an address of this host"
        + (f" ({why})" if why else "")
    )


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _checked(ports: str) -> str:
    first, dash, last = ports.partition("-")
    if not (first.isdigit() and (last.isdigit() if dash else not last)):
        raise ValueError("must be a port, a range such as 52000-52015, or 0 for any free one")
    low, high = int(first), int(last or first)
    if high > 65535 or low > high or (dash and low == 0):
        raise ValueError("must lie within 1 to 65535, the lower port first")
    return ports


Ports = Annotated[str, BeforeValidator(_as_text), AfterValidator(_checked)]
"""`52000`, `52000-52015` or `0`."""
