"""The gRPC server behind TLS, where another transport counts what waits."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from cluster.config_clients import TlsConfig
from router.tls import grpc_context
from tests.integration.certificates import make_certificates
from tests.integration.rpc_serving import WAIT, channel, serving


@pytest.fixture
def server_side(tmp_path: Path) -> ssl.SSLContext:
    make_certificates(tmp_path)
    return grpc_context(
        TlsConfig(cert_file=tmp_path / "server.crt", key_file=tmp_path / "server.key")
    )


@pytest.fixture
def client_side(server_side: ssl.SSLContext, tmp_path: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials((tmp_path / "ca.crt").read_bytes())


async def test_calls_one_after_another_and_at_once(
    server_side: ssl.SSLContext, client_side: grpc.ChannelCredentials
) -> None:
    async with serving(tls=server_side) as (_, _, address), channel(address, client_side) as c:
        echo = c.unary_unary("/t.T/echo")
        for i in range(100):
            assert await echo(b"%d" % i, timeout=WAIT) == b"%d" % i
        asked = [b"%d" % i for i in range(100)]
        assert await asyncio.gather(*(echo(a, timeout=WAIT) for a in asked)) == asked


async def test_streams_larger_than_any_window(
    server_side: ssl.SSLContext, client_side: grpc.ChannelCredentials
) -> None:
    async with serving(tls=server_side) as (_, _, address), channel(address, client_side) as c:

        async def requests() -> AsyncIterator[bytes]:
            for i in range(100):
                yield bytes((i,)) * 50_000

        got = [m async for m in c.stream_stream("/t.T/each")(requests(), timeout=WAIT)]
        assert got == [bytes((i,)) * 50_000 for i in range(100)]
        flood = c.unary_stream("/t.T/flood")(b"", timeout=WAIT)
        await flood.read()
        await asyncio.sleep(0.2)  # What is not read waits: here, and there.
        assert [len(await flood.read()) for _ in range(999)] == [10_000] * 999
        assert await flood.read() is grpc.aio.EOF
