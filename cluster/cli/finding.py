"""What a check of `pdserve doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` is empty when it is ok."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
