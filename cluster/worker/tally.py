"""What a worker has computed, counted as it says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.worker.sequence import Emit, SequenceStart, SequenceStep


class Tally:
    """Counts from the life's beginning.

    Attributes:
        prompt_tokens: of prompts whose first token came out here, cached ones included.
        output_tokens: a decode stage's first one is prefill's, and not counted again.
        begun: sequences that run and have a token.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.begun = 0

    @contextmanager
    def of(self, start: SequenceStart, emit: Emit) -> Iterator[Emit]:
        """What a sequence is to emit with, as long as it runs."""
        begun = False

        def counted(step: SequenceStep) -> None:
            nonlocal begun
            self.output_tokens += len(step.token_ids)
            if not begun and step.token_ids:
                begun = True
                self.begun += 1
                if start.stage == "decode":
                    self.output_tokens -= 1
                else:
                    self.prompt_tokens += len(start.prompt_token_ids)
            emit(step)

        try:
            yield counted
        finally:
            self.begun -= begun
