"""What surrounds a router in its tests: scripted workers on real sockets, a registry in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.store.records import JournalEntry, RouterRecord, WorkerRecord
from cluster.store.registry import Members
from cluster.ticket import Ticket, TicketSigner
from pdserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from router.server import RouterServer
from router.store import Store
from router.tokenize import Tokenizer

SECRET = b"a secret of the tests"
SIGNER = TicketSigner(SECRET)
MODEL = "tiny"
VOCAB, CONTEXT = 1000, 20_000

Send = Callable[[worker_pb2.SequenceOutput], None]
Script = Callable[["FakeWorker", worker_pb2.StartSequence, Send], Awaitable[None]]


class Letters:
    """A tokenizer of one token a character; 1 stands in front of plain text."""

    chat_template = "yes"

    def __len__(self) -> int:
        return VOCAB

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        letters = [2 + ord(c) % 900 for c in text]
        return [1, *letters] if add_special_tokens else letters

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f"t{i - 10} " if i >= 10 else "?" for i in token_ids)

    def apply_chat_template(
        self, turns: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        if turns[0]["role"] == "tool":
            raise ValueError("no tools here")
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"


class FakeRegistry:
    """The store's registry, in memory; `out` takes it away."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerRecord] = {}
        self._routers: dict[str, RouterRecord] = {}
        self._changed = asyncio.Event()
        self.out = False

    def put(self, record: WorkerRecord) -> None:
        self._workers[record.worker_id] = record
        self.change()

    def remove(self, worker_id: str) -> None:
        del self._workers[worker_id]
        self.change()

    def change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[Members]:
        while True:
            changed = self._changed
            self._check()
            yield Members(tuple(self._workers.values()), ())
            await changed.wait()

    async def routers(self) -> list[RouterRecord]:
        self._check()
        return list(self._routers.values())

    async def put_router(self, record: RouterRecord, lease_seconds: float) -> bool:
        self._check()
        self._routers[record.router_id] = record
        return True

    async def remove_router(self, router_id: str, incarnation: str) -> bool:
        self._check()
        return self._routers.pop(router_id, None) is not None

    def _check(self) -> None:
        if self.out:
            raise Unavailable("the store is out")


class FakeJournal:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.entries: list[JournalEntry] = []

    async def record(self, entries: Sequence[JournalEntry]) -> None:
        self.entries += entries


def going_on(start: worker_pb2.StartSequence) -> int:
    """How many of the fake model's tokens stand at the end of the prompt."""
    prompt = list(start.prompt_token_ids)
    return next((n for n in range(len(prompt), 0, -1) if prompt[-n:] == list(range(10, 10 + n))), 0)


def token_output(start: worker_pb2.StartSequence, i: int) -> worker_pb2.SequenceOutput:
    """Token i after the prompt: the one completion that the fake model knows is 10, 11, … with
    the text "t0 t1 …"; it goes on where the prompt ends with some of it."""
    k = going_on(start) + i
    output = worker_pb2.SequenceOutput(
        sequence_id=start.sequence_id, offset=i, token_ids=[10 + k], text=f"t{k} "
    )
    if start.sampling.HasField("logprobs"):
        sampled = common_pb2.Logprob(token_id=10 + k, logprob=-0.5, rank=1, text=f"t{k} ")
        other = common_pb2.Logprob(token_id=9, logprob=float("-inf"), rank=2, text="x")
        output.logprobs.add(sampled=sampled, top=[sampled, other][: start.sampling.logprobs])
    if i + 1 == start.sampling.max_tokens or start.stage == worker_pb2.STAGE_PREFILL:
        output.finish_reason = common_pb2.FINISH_REASON_LENGTH
        output.report.accepted_ago_seconds = 0.0
        output.report.cached_prompt_tokens = 1
        output.report.landed_ago_seconds = -1
        if start.stage == worker_pb2.STAGE_DECODE:
            output.report.handoff.transport = "grpc"
            output.report.handoff.bytes = 4096
    return output


async def obedient(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
    """Prefill sends the first token; decode all of them, once `worker.gate` is open."""
    if start.stage == worker_pb2.STAGE_PREFILL:
        send(token_output(start, 0))
        return
    await worker.gate.wait()
    for i in range(start.sampling.max_tokens):
        send(token_output(start, i))


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """A worker that does as its script says.

    Attributes:
        started, cancelled: what the router sent, in order.
        gate: closed, it holds decode back.
    """

    def __init__(self, worker_id: str, role: str, script: Script = obedient) -> None:
        self.record = WorkerRecord(
            worker_id,
            f"{worker_id}-life",
            MODEL,
            role,
            "ready",
            layout="l",
            transport="grpc",
            max_model_len=CONTEXT,
            vocab_size=VOCAB,
            plans_ahead=True,
            graph_tokens=256,
        )
        self.script = script
        self.started: asyncio.Queue[worker_pb2.StartSequence] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self._server: grpc.aio.Server | None = None

    async def serve(self) -> None:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.record = replace(self.record, address=f"127.0.0.1:{port}")
        await self._server.start()

    async def die(self) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def Serve(self, requests: AsyncIterator[Any], context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        assert metadata["authorization"] == f"Bearer {SIGNER.call_token()}"
        hello = (await anext(aiter(requests))).hello
        if hello.incarnation != self.record.incarnation:
            await context.abort(grpc.StatusCode.NOT_FOUND, "another worker lives here now")
        await context.send_initial_metadata(())
        outputs: asyncio.Queue[worker_pb2.SequenceOutput] = asyncio.Queue()
        running: dict[str, asyncio.Task[None]] = {}

        async def write() -> None:
            while True:
                batch = [await outputs.get()]
                while not outputs.empty():
                    batch.append(outputs.get_nowait())
                await context.write(worker_pb2.WorkerMessage(outputs=batch))

        writer = asyncio.create_task(write())
        try:
            async for message in requests:
                if message.HasField("start"):
                    self.started.put_nowait(message.start)
                    script = self.script(self, message.start, outputs.put_nowait)
                    running[message.start.sequence_id] = asyncio.ensure_future(script)
                else:
                    running[message.cancel.sequence_id].cancel()
                    self.cancelled.put_nowait(message.cancel.sequence_id)
        finally:
            for task in (writer, *running.values()):
                task.cancel()

    async def Describe(self, request: Any, context: Any) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(
            worker_id=self.record.worker_id,
            running_sequences=3,
            ledger=[worker_pb2.LedgerEntry(blocks=2, bytes=64), worker_pb2.LedgerEntry(blocks=1)],
        )

    def ticket(self, start: worker_pb2.StartSequence) -> Ticket:
        """The ticket that came with `start`, its signature checked."""
        return SIGNER.verify(start.ticket, now_wall=0.0 + _issued(start.ticket))


def _issued(wire: bytes) -> float:
    import json

    return float(json.loads(wire.rpartition(b".")[0])["issued_at"])


class Cluster:
    """A router between fakes."""

    def __init__(self, *, tenants: Any = (), **router_settings: Any) -> None:
        self.registry = FakeRegistry()
        self.journal = FakeJournal()
        self.prefill = FakeWorker("p-0", "prefill")
        self.decode = FakeWorker("d-0", "decode")
        self.workers = [self.prefill, self.decode]
        self.config = Config(
            models=[{"name": MODEL, "path": "/nowhere"}],  # type: ignore[list-item]
            router={"grpc_port": 0, "http_port": 0, **router_settings},  # type: ignore[arg-type]
            tenants=list(tenants),
            placement={"disaggregate": "always"},  # type: ignore[arg-type]
        )
        self.router = self.new_router("r-0")

    def new_router(self, router_id: str, **settings: Any) -> RouterServer:
        config = self.config
        if settings:
            router = config.router.model_copy(update=settings)
            config = config.model_copy(update={"router": router})
        return RouterServer(
            config,
            router_id,
            "life",
            SECRET,
            "",
            store=Store(self.registry, self.journal),
            tokenizers={MODEL: Tokenizer(Letters())},
        )

    async def add(self, worker: FakeWorker) -> None:
        await worker.serve()
        self.workers.append(worker)
        self.registry.put(worker.record)

    async def start(self) -> None:
        for worker in self.workers:
            await worker.serve()
            self.registry.put(worker.record)
        await self.router.start()
        await self.router.wait_ready(30)

    async def stop(self) -> None:
        await self.router.stop(0)
        for worker in self.workers:
            with contextlib.suppress(Exception):
                await worker.die()

    @property
    def url(self) -> str:
        return f"http://{self.router.http_address}"


@contextlib.asynccontextmanager
async def running_cluster(**settings: Any) -> AsyncIterator[Cluster]:
    cluster = Cluster(**settings)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
