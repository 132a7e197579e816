"""The other process: takes what is sent to it and says how long it was busy.

Each peer prints one line of JSON when it is ready and then one per line it is sent on stdin.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import torch

from bench.handoff.cache import TOKENS, make_agent
from cluster.kv.geometry import HeadRun
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import PagedCache
from cluster.kv.reservation import Reserve
from cluster.kv.transport.allocator import keep_large_blocks
from cluster.kv.transport.checksums import DeviceSum, value

READ_BYTES = 4 << 20
METHOD = "/bench.Sink/Push"


def cpu_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def grpc_options(frame: int) -> list[tuple[str, int]]:
    """Any message size; HTTP/2 frames of `frame` bytes, 0 for the default."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return [*options, ("grpc.http2.max_frame_size", frame)] if frame else options


def serve_tcp() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    say(port=listener.getsockname()[1])

    def take(connection: socket.socket) -> None:
        buffer = bytearray(READ_BYTES)
        while connection.recv_into(buffer):
            pass
        connection.close()

    def accept() -> None:
        while True:
            threading.Thread(target=take, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    for _ in sys.stdin:
        say(cpu=cpu_seconds())


async def send_grpc(port: int, count: int, message: int, frame: int) -> None:
    """Sends as many bytes as it is told, over `count` channels; answers with the rate."""
    keep_large_blocks()
    data = random.randbytes(message)
    options = [*grpc_options(frame), ("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(count)
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))

    async def push(channel: grpc.aio.Channel, messages: int) -> None:
        call = channel.stream_stream(METHOD)()
        for _ in range(messages):
            await call.write(data)
        await call.done_writing()
        await call.read()

    say()
    while line := await asyncio.to_thread(sys.stdin.readline):
        share = max(1, json.loads(line)["size"] // message // count)
        began = time.monotonic()
        await asyncio.gather(*(push(channel, share) for channel in channels))
        say(rate=share * count * message / (time.monotonic() - began))


async def serve_grpc(frame: int) -> None:
    keep_large_blocks()

    async def push(messages: AsyncIterator[bytes], context: Any) -> None:
        size = 0
        async for message in messages:
            size += len(message)
        await context.write(str(size).encode())

    server = grpc.aio.server(options=grpc_options(frame))
    service, method = METHOD.strip("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(push)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    say(port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    while await asyncio.to_thread(sys.stdin.readline):
        say(cpu=cpu_seconds())


def serve_decode(blocks: int, device: str, transport: str, staging: int | None) -> None:
    """Reserves blocks for each ticket it is told, and answers when their KV has landed."""
    agent, cache = make_agent("decode", blocks, device, transport, staging=staging)  # type: ignore[arg-type]
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
        total.add(payload)
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
    kind, *rest = sys.argv[1:]
    if kind == "tcp":
        serve_tcp()
    elif kind == "grpc-sink":
        asyncio.run(serve_grpc(int(rest[0])))
    elif kind == "grpc-source":
        asyncio.run(send_grpc(*map(int, rest)))
    else:
        serve_decode(int(rest[0]), rest[1], rest[2], int(rest[3]) if rest[3] else None)
