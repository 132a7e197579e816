"""What of the environment is meant for the configuration and would not reach it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from pydantic import BaseModel
from pydantic_settings import SettingsError

from cluster.config_errors import section_of
from cluster.errors import ConfigError

PREFIX, BETWEEN = "PDSERVE_", "__"


def check_environment(root: type[BaseModel], names: Iterable[str]) -> None:
    """Raises ConfigError for a variable that reads like a field of `root` and is none.

    It names a section that there is not, PDSERVE_ROUTR__GRPC_PORT, or has too few underscores
    before a field, PDSERVE_STORE_URL. Other variables with the prefix are others': Kubernetes makes
    some for every Service.
    """
    for name in sorted(names):
        if not name.startswith(PREFIX):
            continue
        path = name.removeprefix(PREFIX).lower()
        section, nested, _ = path.partition(BETWEEN)
        if nested and section not in root.model_fields:
            close = difflib.get_close_matches(section, root.model_fields, n=1)
            meant = f"; did you mean {_variable(close[0])}{BETWEEN}…?" if close else ""
            raise ConfigError(f"{name}: {section} is not a section{meant}")
        if not nested and (field := _squeezed(path, root)):
            raise ConfigError(f"{name}: did you mean {_variable(field)}?")


def unreadable(error: SettingsError) -> ConfigError:
    """In our words; never the value."""
    found = re.search(r'field "(\w+)"', str(error))
    variable = _variable(found[1]) if found else f"{PREFIX}…"
    return ConfigError(
        f"{variable}: must be JSON; or set its fields one by one, as {variable}{BETWEEN}FIELD"
    )


def _squeezed(path: str, root: type[BaseModel]) -> str:
    """The field, such as store__url, whose name with one underscore `path` is; else empty."""
    for section, info in root.model_fields.items():
        inner = section_of(info.annotation)
        rest = path.removeprefix(f"{section}_")
        if inner is not None and rest != path and rest in inner.model_fields:
            return f"{section}{BETWEEN}{rest}"
    return ""


def _variable(field: str) -> str:
    return PREFIX + field.upper()
