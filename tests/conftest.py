"""What holds for every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# How long an example takes depends on what else the machine does; nothing here asserts a time.
settings.register_profile("pdserve", deadline=None)
settings.load_profile("pdserve")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pdserve")
    group.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the KV caches of tests/handoff are; cuda: prefill's on the first GPU, decode's"
        " on the second if there is one",
    )
    group.addoption(
        "--transport",
        choices=["grpc", "nccl"],
        default="grpc",
        help="how their KV crosses; nccl: between two GPUs, or on CPUs all of it but NCCL itself",
    )
