"""The other process of a handoff: takes what is sent to it and says when it was there.

It prints one line of JSON when it is ready and then one per line it is sent on stdin.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.handoff.cache import TOKENS, make_agent
from bench.handoff.plain_peers import cpu_seconds, say
from cluster.kv.geometry import HeadRun
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import PagedCache
from cluster.kv.reservation import Reserve
from cluster.kv.transport.checksums import DeviceSum, Tally, value


def serve_decode(
    blocks: int,
    device: str,
    transport: str,
    frame: int,
    link: int | None,
    max_ctas: int | None,
) -> None:
    """Reserves blocks for each ticket it is told, and answers when their KV has landed."""
    agent, cache = make_agent(
        "decode", blocks, device, transport, frame << 20, link=link, max_ctas=max_ctas  # type: ignore[arg-type]
    )  # fmt: skip
    say(address=agent.address, cpu=cpu_seconds())
    for line in sys.stdin:
        told = json.loads(line)
        if "ticket" not in told:
            say(cpu=cpu_seconds())
            continue
        count = -(-told["num_tokens"] // TOKENS)
        ids = tuple(random.sample(range(blocks), count))
        reserve = Reserve(
            "r", told["handoff_id"], told["ticket"], told["num_tokens"], ids, 0, 120.0
        )
        stamp = agent.generations.stamp(ids)
        agent.post(lambda reserve=reserve, stamp=stamp: agent.receiver.reserve(reserve, stamp))  # type: ignore[misc]
        say(reserved=True)
        result = wait_for_result(agent.mailbox, told["handoff_id"])
        used = cpu_seconds()
        say(
            digest=digest(cache, ids) if told["compare"] else 0,
            error=result.error,
            transport=result.transport,
            granted_at=result.granted_at,
            last_frame_at=result.last_frame_at,
            ended_at=result.ended_at,
            cpu=used,
        )


def digest(cache: PagedCache, block_ids: Sequence[int]) -> int:
    """Of the contents of blocks, in all layers."""
    total = DeviceSum(cache.device, None, 0)
    for layer in range(cache.num_layers):
        size = len(block_ids) * cache.block_bytes
        payload = torch.empty(size, dtype=torch.uint8, device=cache.device)
        layers = range(layer, layer + 1)
        cache.gather(layers, cache.index(block_ids), HeadRun(0, cache.heads), payload)
        if (fence := cache.mark()) is not None:
            fence.synchronize()
        Tally(total, layer).count(payload)
    fetched = total.fetch()
    if (fence := cache.fence()) is not None:
        fence.synchronize()
    return value(fetched)


def wait_for_result(mailbox: Mailbox, handoff_id: str) -> Any:
    """Polls seldom, so that it takes no time from the agent."""
    while True:
        for result in mailbox.take_results():
            if result.handoff_id == handoff_id:
                mailbox.take_finished()
                return result
        time.sleep(0.002)


if __name__ == "__main__":
    blocks, device, transport, frame, *limits = sys.argv[1:]
    link, max_ctas = (int(limit) if limit else None for limit in limits)
    serve_decode(int(blocks), device, transport, int(frame), link, max_ctas)
