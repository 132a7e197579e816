"""What is wrong with a configuration, in words that lead to the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel], path: Path | None) -> str:
    """One line that names every bad field, what was meant, and what was given; secrets, and what
    stands in the place of a section that may have some, are never repeated.

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
        elif item["type"] in ("model_type", "model_attributes_type"):
            message = "must be a section" + _fields(item["loc"], root)
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
    section = _at(loc[:-1], root)
    if section is None:
        return ""
    close = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(section.model_fields)}"
    )


def _fields(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    section = _at(loc, root)
    return f" with fields of {', '.join(section.model_fields)}" if section else ""


def _at(loc: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a location."""
    section = root
    for part in loc:
        if isinstance(part, int):
            continue
        info = section.model_fields.get(part)
        inner = section_of(info.annotation) if info else None
        if inner is None:
            return None
        section = inner
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds a list of; None if it holds a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        if found := section_of(arg):
            return found
    return None
