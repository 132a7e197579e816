"""vLLM's KV events, as vLLM 0.32 makes them, become the names that routers look for."""

from __future__ import annotations

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from cluster.engine.blocks import HeldBlocks
from cluster.engine.kv_events import BlockNames
from cluster.prefix import block_hashes

pytestmark = pytest.mark.slow
PROMPT = list(range(12))


def stored(hashes: list[int], parent: int | None, tokens: list[int], **more: object) -> BlockStored:
    values = {"lora_id": None, "medium": "GPU", "lora_name": None, **more}
    return BlockStored(
        block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=4, **values
    )


def removed(*hashes: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), medium="GPU")


def test_a_prompt_in_two_steps_has_the_names_of_the_whole() -> None:
    names = BlockNames()
    first, gone = names.see([stored([7, 8], None, PROMPT[:8], extra_keys=[("salt",), None])])
    rest, _ = names.see([stored([9], 8, PROMPT[8:])])
    assert [*first, *rest] == block_hashes(PROMPT, 4, "salt").tolist() and not gone


def test_a_block_is_gone_with_its_last_copy() -> None:
    names = BlockNames()
    (name,), _ = names.see([stored([7], None, PROMPT[:4])])
    assert names.see([stored([7], None, PROMPT[:4]), removed(7)]) == ([], [])
    assert names.see([removed(7), removed(7)]) == ([], [name])


def test_a_block_that_comes_and_goes_in_one_step_is_not_held() -> None:
    held, names = HeldBlocks(), BlockNames()
    came, gone = stored([7], None, PROMPT[:4]), removed(7)
    held.change(*names.see([came, gone]))
    assert not held.names
    held.change(*names.see([came]))
    held.change(*names.see([gone, came]))
    assert len(held.names) == 1
    held.change(*names.see([came, AllBlocksCleared()]))
    assert not held.names


def test_what_follows_a_missed_block_is_left_out() -> None:
    names = BlockNames()
    assert names.see([stored([9], 8, PROMPT[8:])]) == ([], [])
    assert names.see([stored([9], None, PROMPT[:4], medium="CPU"), removed(8)]) == ([], [])


def test_a_cleared_cache_holds_nothing() -> None:
    held, names = HeldBlocks(), BlockNames()
    heard: list[tuple[list[int], list[int]]] = []
    held.listen(lambda came, went: heard.append((list(came), list(went))))
    held.change(*names.see([stored([7, 8], None, PROMPT[:8])]))
    held.change(*names.see([AllBlocksCleared()]))
    assert not held.names
    assert sorted(heard[0][0]) == sorted(heard[1][1]) and len(heard) == 2
