"""What a cluster needs from others: its store, a Ray of several hosts, its callers' credentials."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

from cluster.cli.finding import Check
from cluster.config import Config
from cluster.control.arrival import check_clock
from cluster.errors import ConfigError, PdserveError
from cluster.store.client import address_of, connect
from cluster.store.clock import ahead_seconds
from cluster.store.embedded import server_binary
from cluster.ticket import CLOCK_TOLERANCE_SECONDS


def callers(config: Config) -> Iterator[Check]:
    """Whether the callers' credentials can be read. On other hosts, each router looks itself."""
    sections = [(f"tenants.{tenant.name}", tenant) for tenant in config.tenants]
    for field, credentials in (*sections, ("operator", config.operator)):
        if not credentials.given:
            continue
        try:
            count = len(credentials.tokens(field)) + len(credentials.identities)
            yield Check(field, "ok", f"{count} credentials")
        except ConfigError as error:
            detail = str(error).partition(": ")[2]
            if config.ray.address is None:
                yield Check(field, "fail", detail, "make the secret, or mend the field")
            else:
                yield Check(field, "warn", detail, "the routers' hosts must have it")


def store(config: Config) -> Iterator[Check]:
    """The embedded Valkey's binary, or the configured store and how far its clock is off."""
    try:
        if config.store.url is None:
            yield Check("store", "ok", f"embedded ({server_binary().name})")
        else:
            url = config.store.url.get_secret_value()
            ahead = asyncio.run(_try_store(url, config.store.connect_timeout_seconds))
            yield Check("store", "ok", f"{address_of(url)} answers")
            yield _clock(ahead)
    except PdserveError as error:
        detail, _, remedy = str(error).partition(": ")
        yield Check("store", "fail", detail, remedy)


def _clock(ahead_seconds: float) -> Check:
    try:
        check_clock(ahead_seconds, "of this host")
    except ConfigError as error:
        detail, _, remedy = str(error).partition(": ")
        return Check("clock", "fail", detail, remedy)
    return Check("clock", "ok", f"within {CLOCK_TOLERANCE_SECONDS / 2:g} s of the store's")


def external_ray(config: Config) -> Iterator[Check]:
    """An external Ray: whether it answers, asks for a token, and has a store its hosts reach."""
    address = config.ray.address
    if address is None:
        return
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            yield Check("ray", "ok", f"{address} answers")
        except OSError as error:
            why = f"{address}: {error.strerror or error}"
            yield Check("ray", "fail", why, "start it with `ray start --head`, mend ray.address")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        why = "RAY_AUTH_MODE is not token: whoever reaches Ray can run code on its hosts"
        remedy = "start Ray and pdserve with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        yield Check("ray token", "warn", why, remedy)
    if config.store.url is None:
        why = "ray.address is set and the embedded store listens on this host only"
        yield Check("store.url", "fail", why, "set store.url to a Valkey that all hosts reach")


async def _try_store(url: str, timeout: float) -> float:
    client = await connect(url, timeout)
    try:
        return await ahead_seconds(client)
    finally:
        await client.aclose()
