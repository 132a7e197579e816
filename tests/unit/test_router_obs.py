"""Log lines and metrics: one event a line, units in the names."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.errors import ConfigError
from cluster.obs import logs
from cluster.obs.metrics import RouterMetrics


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("router", logging.INFO, __file__, 1, message, (), None)
    made.fields = fields
    return made


def test_json_lines_carry_the_request() -> None:
    token = logs.REQUEST_ID.set("req-1")
    try:
        line = json.loads(logs.JsonLines().format(record("request ended", tokens=3)))
    finally:
        logs.REQUEST_ID.reset(token)
    assert (line["request_id"], line["tokens"], line["level"]) == ("req-1", 3, "info")
    assert line["time"].endswith("Z")


def test_a_message_cannot_forge_a_line() -> None:
    line = logs.HumanLines().format(record("one\ntwo", model="m"))
    assert "\n" not in line
    assert line.endswith("one\\ntwo model=m")


def test_unknown_levels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigError, match="PDSERVE_LOG_LEVEL"):
        logs.setup()


def test_registries_are_apart_and_gone_workers_become_zero() -> None:
    first, second = RouterMetrics(CollectorRegistry()), RouterMetrics(CollectorRegistry())
    first.count_workers({("m", "decode", "ready"): 2})
    first.count_workers({("m", "decode", "draining"): 1})
    text = generate_latest(first.registry).decode()
    assert 'pdserve_workers{model="m",role="decode",state="ready"} 0.0' in text
    assert 'pdserve_workers{model="m",role="decode",state="draining"} 1.0' in text
    assert 'role="decode"' not in generate_latest(second.registry).decode()
