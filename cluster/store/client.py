"""The connection to the store, and one place where its failures become `Unavailable`.

The password of a URL never leaves this module: errors name the host and port only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.errors import ConfigError, Unavailable

OLDEST_SERVER = (6, 2)
"""GETEX, ZRANGE … BYSCORE and the script behaviour the records rely on."""

HEALTH_CHECK_SECONDS = 10
MAX_CONNECTIONS = 64


async def connect(url: str, timeout: float) -> Redis:
    """A client of the store at `url`, checked to answer.

    Every command takes at most `timeout` seconds a try and is tried three times, 50 to 500 ms
    apart; replies are decoded to str. The caller owns the client and closes it with `aclose()`.

    Raises:
        Unavailable: nothing answers, the password is wrong, or the server is older than 6.2.
        ConfigError: the URL is not one.
    """
    try:
        # Blocking: more calls at once than connections wait for one, and do not fail.
        pool = BlockingConnectionPool.from_url(
            url,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
            retry_on_error=[RedisConnectionError, RedisTimeoutError],
            health_check_interval=HEALTH_CHECK_SECONDS,
            max_connections=MAX_CONNECTIONS,
            decode_responses=True,
        )
        client = Redis.from_pool(pool)
    except ValueError as error:
        raise ConfigError(
            "store.url: must be redis://[:PASSWORD@]HOST:PORT/DATABASE, rediss://… or unix://…"
        ) from error
    try:
        with store_errors(address_of(url)):
            info = await client.info("server")
        version = str(info.get("valkey_version") or info.get("redis_version") or "0")
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_SERVER:
            raise Unavailable(
                f"the store at {address_of(url)} is version {version}; "
                "pdserve needs Valkey or Redis 6.2 or newer"
            )
    except BaseException:
        await client.aclose()
        raise
    return client


def address_of(url: str) -> str:
    """Where `url` points, without user and password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix:{parts.path}"
    try:
        port = parts.port or 6379
    except ValueError:
        port = 6379
    return f"{parts.hostname or 'localhost'}:{port}"


@contextmanager
def store_errors(where: str = "") -> Iterator[None]:
    """Turns the client library's errors into `Unavailable`, each with its remedy.

    Wrap every call of the library in it: its own timeouts now and then swallow a cancellation of
    the task (they catch the TimeoutError they caused), and this raises it again.
    """
    with _cancellation_kept(), _named(where):
        yield


@contextmanager
def _cancellation_kept() -> Iterator[None]:
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


@contextmanager
def _named(where: str) -> Iterator[None]:
    store = f"the store at {where}" if where else "the store"
    try:
        yield
    except (AuthenticationError, AuthorizationError) as error:
        raise Unavailable(
            f"{store} refuses the password: mend store.url, redis://:PASSWORD@HOST:PORT/0"
        ) from error
    except NoPermissionError as error:
        raise Unavailable(
            f"{store} denies a command to this user: allow it keys pdserve:*, channels pdserve:* "
            "and @read @write @scripting @pubsub @connection"
        ) from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise Unavailable(
            f"{store} does not answer: check that it runs and that store.url reaches it from here"
        ) from error
    except ResponseError as error:
        text = str(error)
        if text.startswith(("NOAUTH", "WRONGPASS")):
            raise Unavailable(f"{store} wants a password: put it into store.url") from error
        raise Unavailable(f"{store} refused a command: {text}") from error
    except RedisError as error:
        raise Unavailable(f"{store} failed: {type(error).__name__}") from error
