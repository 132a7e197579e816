"""The other process of a raw socket and of bare gRPC: takes what is sent to it, or sends.

Each prints one line of JSON when it is ready and then one per line it is sent on stdin. Imports
little, because many are started.
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
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from bench.handoff.allocator import keep_large_blocks

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


def serve_tcp(memory: int) -> None:
    """Takes bytes into so much memory, from its beginning again when it is full."""
    buffer = memoryview(bytearray(b"\1") * memory)
    listener = socket.create_server(("127.0.0.1", 0))
    say(port=listener.getsockname()[1])

    def take(connection: socket.socket) -> None:
        at = 0
        while size := connection.recv_into(buffer[at : at + READ_BYTES]):
            at = (at + size) % memory
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
        call: Any = channel.stream_stream(METHOD)()
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
    handler: Any = grpc.stream_stream_rpc_method_handler(push)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    say(port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    while await asyncio.to_thread(sys.stdin.readline):
        say(cpu=cpu_seconds())


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "tcp":
        serve_tcp(int(rest[0]))
    elif kind == "grpc-sink":
        asyncio.run(serve_grpc(int(rest[0])))
    else:
        asyncio.run(send_grpc(*map(int, rest)))
