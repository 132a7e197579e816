"""The systems that are compared: one vLLM, vLLM's own split over NIXL, and pdserve's."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from dataclasses import replace
from typing import Any, Protocol

from bench.gpu.fleet import Engine
from bench.gpu.pairing import pair
from bench.gpu.timing import Crossing, Request
from bench.gpu.wire import Generate, Generated
from cluster.engine.protocol import Sampling

LOWEST_WORD = 6
NIXL_ASK: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_names = itertools.count()


class System(Protocol):
    """Serves a prompt; the clock starts before the first engine is told of it.

    Every request has a cache salt of its own, so none finds its prompt in a prefix cache.
    """

    name: str

    async def run(self, prompt: array[int], sampling: Sampling) -> Request: ...


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> array[int]:
    """Tokens of no meaning, as array items of 4 bytes."""
    return array("I", [rng.randrange(LOWEST_WORD, vocab_size) for _ in range(length)])


def fresh_name() -> str:
    return f"bench-{next(_names)}"


class Whole:
    """One engine that serves the whole request."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine

    async def run(self, prompt: array[int], sampling: Sampling) -> Request:
        name = fresh_name()
        began = time.monotonic()
        done = await self._engine.generate(Generate(name, prompt, sampling, name))
        return _request(began, done, sampling)


class NixlSplit:
    """vLLM 1P1D as its documentation has it: prefill answers, then decode is asked and pulls.

    The first token is decode's, which samples it again.
    """

    def __init__(self, name: str, prefill: Engine, decode: Engine) -> None:
        self.name = name
        self._prefill = prefill
        self._decode = decode

    async def run(self, prompt: array[int], sampling: Sampling) -> Request:
        one = replace(sampling, max_tokens=1)
        name = fresh_name()
        began = time.monotonic()
        first = await self._prefill.generate(
            Generate(f"{name}-p", prompt, one, name, remote=dict(NIXL_ASK))
        )
        if first.remote is None:
            raise ValueError("the prefill vLLM gave no transfer parameters")
        done = await self._decode.generate(
            Generate(f"{name}-d", prompt, sampling, name, remote=first.remote)
        )
        return _request(began, done, sampling)


class Split:
    """pdserve's two engines, told at the same time, with a ticket between them.

    Args:
        again: prefill may find the prompt in its prefix cache, decode still may not.
    """

    def __init__(self, name: str, prefill: Engine, decode: Engine, again: bool = False) -> None:
        self.name = name
        self.prefill = prefill
        self.decode = decode
        self._again = again

    async def run(self, prompt: array[int], sampling: Sampling) -> Request:
        prefill, decode = self.prefill, self.decode
        assert prefill.info is not None and decode.info is not None
        send, take = pair(
            (prefill.spec.name, prefill.info),
            (decode.spec.name, decode.info),
            prompt,
            prefill.spec.secret,
        )
        one = replace(sampling, max_tokens=1, min_tokens=min(1, sampling.min_tokens))
        name = fresh_name()
        salt = "again" if self._again else name
        began = time.monotonic()
        first, rest = await asyncio.gather(
            prefill.generate(Generate(f"{name}-p", prompt, one, salt, send)),
            decode.generate(Generate(f"{name}-d", prompt, sampling, name, take)),
        )
        if rest.result is not None and rest.result.error:
            raise ValueError(f"the handoff failed: {rest.result.error}")
        if first.tokens != rest.tokens[:1]:
            raise ValueError("decode went on after another first token")
        if rest.result is None:
            raise ValueError("decode did not say how the handoff ended")
        request = _request(began, rest, sampling)
        return replace(
            request,
            stamps=(first.stamps[0], *request.stamps[1:]),
            gaps=(*first.gaps, *request.gaps[1:]),
            cached=first.cached,
            crossing=Crossing(rest.result, first.result, first.stamps[0]),
        )


def _request(began: float, done: Generated, sampling: Sampling) -> Request:
    if len(done.tokens) != sampling.max_tokens:
        raise ValueError(f"{len(done.tokens)} tokens of {sampling.max_tokens}")
    return Request(began, done.tokens, done.stamps, done.cached, done.gaps)
