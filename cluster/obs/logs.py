"""Logging: a line an event, for people or as JSON, with the request's id. Never a prompt's text."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextvars import ContextVar
from typing import Literal

from cluster.errors import ConfigError

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Set while a request is handled; every line logged meanwhile carries it."""

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class JsonLines(logging.Formatter):
    """One JSON object a line; what is passed as `extra={"fields": {…}}` becomes its keys."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _iso(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """Time, level, logger, message, then fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if request_id := REQUEST_ID.get():
            fields.setdefault("request_id", request_id)
        tail = "".join(f" {key}={value}" for key, value in fields.items())
        head = f"{_iso(record.created)} {record.levelname:<7} {record.name}: "
        # A message of several lines stays one event: a log line cannot be forged by its content.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        text = head + message + tail
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def setup(style: Literal["human", "json"] | None = None) -> None:
    """Sends the process's log to standard error.

    Args:
        style: None takes PDSERVE_LOG_FORMAT, else human on a terminal and json elsewhere.

    Raises:
        ConfigError: PDSERVE_LOG_LEVEL or PDSERVE_LOG_FORMAT is not one of those known.
    """
    level = os.environ.get("PDSERVE_LOG_LEVEL", "INFO").upper()
    if level not in LEVELS:
        raise ConfigError(f"PDSERVE_LOG_LEVEL: must be one of {', '.join(LEVELS)}, not {level}")
    chosen = style or os.environ.get("PDSERVE_LOG_FORMAT", "")
    chosen = chosen or ("human" if sys.stderr.isatty() else "json")
    if chosen not in ("human", "json"):
        raise ConfigError(f"PDSERVE_LOG_FORMAT: must be human or json, not {chosen}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if chosen == "json" else HumanLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # One line a request is ours to write.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def _iso(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
