"""The models a router serves: their names, limits and tokenizers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from cluster.config import ModelConfig
from cluster.errors import Unavailable
from cluster.store.records import WorkerRecord
from router.generation import Prompt
from router.tokenize import Tokenizer
from router.validate import ModelLimits


class Catalog:
    """Models by name, in the configuration's order.

    Args:
        workers: the workers that the router knows now; what they report of their model counts more
            than what the configuration says.
        tokenizers: by model; `load` reads those that are missing.
    """

    def __init__(
        self,
        models: Iterable[ModelConfig],
        workers: Callable[[], Iterable[WorkerRecord]],
        tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._workers = workers
        self._tokenizers = dict(tokenizers or {})

    @property
    def names(self) -> list[str]:
        return list(self._models)

    async def load(self) -> None:
        """Reads the tokenizers. Raises ConfigError if one cannot be read."""
        for name, model in self._models.items():
            if name not in self._tokenizers:
                self._tokenizers[name] = await asyncio.to_thread(Tokenizer.load, model)

    def close(self) -> None:
        for tokenizer in self._tokenizers.values():
            tokenizer.close()

    def limits(self, name: str) -> ModelLimits:
        """Raises Unavailable if neither a worker nor the model's files tell them yet."""
        records = [r for r in self._workers() if r.model == name and r.max_model_len]
        tokenizer = self._tokenizers[name]
        context = min((r.max_model_len for r in records), default=0)
        context = context or self._models[name].max_model_len or tokenizer.max_model_len
        vocabulary = min((r.vocab_size for r in records if r.vocab_size), default=0)
        if not context:
            raise Unavailable(f"model {name} has no worker yet that tells its context length")
        return ModelLimits(name, context, vocabulary or tokenizer.vocab_size)

    def step_tokens(self, name: str) -> int:
        """Tokens that a worker computes in one step."""
        return self._models[name].max_num_batched_tokens

    def planning(self, name: str) -> tuple[bool, int]:
        """Whether a worker that prompts go to plans its steps ahead, and of its steps the tokens
        that CUDA graphs hold; of the first one known."""
        for record in self._workers():
            if record.model == name and record.role != "decode" and record.max_model_len:
                return record.plans_ahead, record.graph_tokens
        return False, 0

    async def encode(self, name: str, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids. Raises InvalidRequest as `Tokenizer.encode`."""
        return await self._tokenizers[name].encode(prompt)

    def settled(self, name: str, token_ids: Sequence[int]) -> bool:
        """As `Tokenizer.settled`."""
        return self._tokenizers[name].settled(token_ids)
