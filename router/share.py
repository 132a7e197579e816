"""What a placed sequence puts on its workers. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.output import Stage


@dataclass
class Share:
    """What one sequence puts on one worker.

    Attributes:
        seconds: predicted prefill work; 0 on decode.
        answered: its first token has come.
        batch: sequences that decoded there when it began.
        tpot: its target per token, seconds.
    """

    slot: int
    stage: Stage
    prompt: int
    output: float
    seconds: float = 0.0
    answered: bool = False
    batch: float = 0.0
    tpot: float = math.inf
