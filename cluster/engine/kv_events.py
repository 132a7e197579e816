"""vLLM's KV events as names of prefix blocks.

The engine core publishes, over a ZeroMQ socket, which blocks its prefix cache took in, with their
tokens and their parent's hash, and which it gave up. vLLM's hashes depend on the process that made
them; the names of `cluster.prefix` do not, so each block gets its name from its parent's state and
its own tokens. Blocks of other media than the engine's own memory are not its prefix cache's.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from cluster.engine.blocks import HeldBlocks
from cluster.prefix import chain, named

log = logging.getLogger(__name__)

_OWN_MEDIA = (None, "GPU")


@dataclass
class _Known:
    """A block that the cache holds, maybe several times.

    Attributes:
        state: of the chain after it.
        position: blocks of its prompt up to it.
    """

    state: int
    position: int
    salt: str
    name: int
    copies: int = 1


class BlockNames:
    """Follows vLLM's events; says which names came and went. Pure."""

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def see(self, events: Iterable[Any]) -> tuple[list[int], list[int]]:
        """The names of blocks that are held after the events, and of those they removed; a name in
        both was gone before it came."""
        stored: dict[int, None] = {}
        removed: list[int] = []
        for event in events:
            gone: list[int] = []
            if isinstance(event, AllBlocksCleared):
                gone = self.clear()
            elif not _of_the_cache(event):
                continue
            elif isinstance(event, BlockStored):
                stored |= dict.fromkeys(self._store(event))
            else:
                gone = self._remove(event.block_hashes)
            removed += gone
            for name in gone:
                stored.pop(name, None)
        return list(stored), removed

    def clear(self) -> list[int]:
        """Nothing is known any more; the names of all that was."""
        known, self._known = self._known, {}
        return [block.name for block in known.values()]

    def _store(self, event: BlockStored) -> list[int]:
        state, position, salt = 0, 0, _salt(event.extra_keys)
        if event.parent_block_hash is not None:
            parent = self._known.get(event.parent_block_hash)
            if parent is None:
                return []  # missed, as everything after it
            state, position, salt = parent.state, parent.position, parent.salt
        states = chain(array("I", event.token_ids), event.block_size, state, position)
        names = named(states, salt).tolist()
        came = []
        for i, (block, after) in enumerate(
            zip(event.block_hashes, states.tolist(), strict=False), position + 1
        ):
            known = self._known.get(block)
            if known is not None:
                known.copies += 1
                continue
            name = names[i - position - 1]
            self._known[block] = _Known(after, i, salt, name)
            came.append(name)
        return came

    def _remove(self, hashes: Iterable[Any]) -> list[int]:
        gone = []
        for block in hashes:
            known = self._known.get(block)
            if known is None:
                continue
            known.copies -= 1
            if not known.copies:
                gone.append(self._known.pop(block).name)
        return gone


def _of_the_cache(event: Any) -> bool:
    known = isinstance(event, BlockStored | BlockRemoved)
    return known and event.medium in _OWN_MEDIA and not event.group_idx


def _salt(extra_keys: list[Any] | None) -> str:
    """Of a prompt's first block; pdserve gives vLLM no other extra key than the cache salt."""
    first = extra_keys[0] if extra_keys else None
    return next((key for key in first or () if isinstance(key, str)), "")


class KvEvents:
    """Subscribes to one engine's events and keeps `held` by them.

    The socket's file is in a directory that only this user can enter.
    """

    def __init__(self, held: HeldBlocks) -> None:
        self._held = held
        self._folder = Path(tempfile.mkdtemp(prefix="pdserve-kv-"))
        self._endpoint = f"ipc://{self._folder / 'events'}"
        self._names = BlockNames()
        self._task: asyncio.Task[None] | None = None

    @property
    def config(self) -> KVEventsConfig:
        """For the engine."""
        return KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=self._endpoint)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="KV events")
        self._task.add_done_callback(_log_failure)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _follow(self) -> None:
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._endpoint)
            expected: int | None = None
            while True:
                _, number, payload = await socket.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if expected is not None and sequence != expected:
                    log.info("KV events %d to %d were lost", expected, sequence - 1)
                    self._held.change((), self._names.clear())
                expected = sequence + 1
                stored, removed = self._names.see(decoder.decode(payload).events)
                self._held.change(stored, removed)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("KV events are not followed any more", exc_info=task.exception())
