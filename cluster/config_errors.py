"""What is wrong with a configuration, in words that lead to the remedy."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

_SECRET = re.compile("url|secret")
"""Fields whose values are never repeated."""


def explain(error: ValidationError, root: type[BaseModel], path: Path | None) -> str:
    """One line that names every bad field, what was meant, and what was given.

    Args:
        root: the model that was to be read.
        path: the file it was read from, if any.
    """
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "cluster"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "is not a field" + _meant(item["loc"], root)
        elif item["type"] == "missing":
            message = "is required"
        elif (
            "url" not in where
            and "secret" not in where
            and not isinstance(item["input"], dict | list)
        ):
            message += f" (got {item['input']!r})"
        lines.append(f"{where}: {message}")
    return f"{path or 'configuration'}: " + "; ".join(lines)


def _meant(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """A suggestion for a misspelt field: the known field of the same section that is closest."""
    section = root
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        info = section.model_fields.get(part)
        inner = _section_of(info.annotation) if info else None
        if inner is None:
            return ""
        section = inner
    close = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(section.model_fields)}"
    )


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        if found := _section_of(arg):
            return found
    return None
