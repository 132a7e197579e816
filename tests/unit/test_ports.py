"""Ports: one, a range, any."""

from __future__ import annotations

import socket

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.errors import ConfigError
from cluster.ports import Ports, candidates, take

PORTS = TypeAdapter(Ports)


@pytest.mark.parametrize(
    ("given", "ports"), [(0, [0]), (80, [80]), ("80", [80]), ("80-82", [80, 81, 82])]
)
def test_what_is_tried(given: object, ports: list[int]) -> None:
    assert list(candidates(PORTS.validate_python(given))) == ports


@pytest.mark.parametrize("given", ["", "a", "-1", "1-", "0-9", "9-8", 65536, "1-2-3", True])
def test_what_is_no_port(given: object) -> None:
    with pytest.raises(ValidationError):
        PORTS.validate_python(given)


def bind(host: str, port: int) -> int:
    with socket.socket() as server:
        server.bind((host, port))
        return int(server.getsockname()[1])


def test_a_taken_port_is_passed_over_and_a_taken_range_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"worker\.ports: cannot listen on port {port}"):
            take(bind, "127.0.0.1", str(port), "worker.ports")
        address = take(bind, "127.0.0.1", f"{port}-{min(port + 20, 65535)}", "worker.ports")
    assert int(address.rpartition(":")[2]) > port
