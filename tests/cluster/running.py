"""A real cluster, started as a user starts it, and a client that checks what it is sent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from cluster.store.client import connect
from cluster.store.records import WorkerRecord
from cluster.store.registry import Registry
from pdserve.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)

PDSERVE = Path(sys.executable).parent / "pdserve"
MODEL = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"
CHUNK = 256
BLOCK = 32
CONTEXT = 2048
START_SECONDS = 280.0

CONFIG = f"""
name: {{name}}
models:
- name: recall-tiny
  path: {MODEL}
  dtype: float32
  block_size: {BLOCK}
  max_num_batched_tokens: {CHUNK}
  kv_cache_bytes: 134217728
  enforce_eager: true
router: {{{{grpc_port: 0, http_port: 0}}}}
placement: {{{{disaggregate: always}}}}
lifecycle: {{{{drain_timeout_seconds: 5}}}}
secret: {{secret}}
"""
SECRET = "the secret of the test cluster"


@dataclass
class Completion:
    """One completion as a client saw it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: int = 0
    stop: str | int | None = None


@dataclass
class Answer:
    completions: dict[int, Completion]
    completed: inference_pb2.Completed


class RunningCluster:
    """`pdserve up` in a process of its own.

    Args:
        within: what runs commands elsewhere, such as `ip netns exec NAME`.
    """

    def __init__(
        self, folder: Path, name: str, config: str = CONFIG, within: tuple[str, ...] = ()
    ) -> None:
        self.within = within
        self.folder = folder
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.yaml"
        self.file.write_text(config.format(name=name, secret=SECRET))
        self.env = {**os.environ, "PDSERVE_RUNTIME_DIR": str(folder / "run")}
        self.log = folder / f"{name}.log"
        """What `pdserve up` says."""
        self.process: subprocess.Popen[str] | None = None
        self.grpc_address = self.http_address = self.operator_address = ""

    def start(self) -> None:
        """Returns when it is ready."""
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [*self.within, PDSERVE, "up", "-f", str(self.file)],
                env=self.env,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )
        deadline = time.monotonic() + START_SECONDS
        state_file = self.folder / "run" / self.name / "state.json"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"did not start:\n{self.log.read_text()}")
            if state_file.exists():
                state = json.loads(state_file.read_text())
                if state["state"] == "ready":
                    self._note(state)
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready in time:\n{self.log.read_text()}")

    def find_router(self, seconds: float = 30) -> None:
        """Waits until a router answers where `pdserve up` says; after one has died."""
        state_file = self.folder / "run" / self.name / "state.json"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = json.loads(state_file.read_text())
            self._note(state)
            with suppress(grpc.RpcError):
                if all(worker.connected for worker in self.view().workers):
                    return
            time.sleep(0.2)
        raise AssertionError(f"no router answers at {self.grpc_address}")

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, list[str]]:
        """Ends it; its exit status, and the processes it left behind."""
        assert self.process is not None
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(120)
        _, alive = psutil.wait_procs(family, timeout=15)
        left = [f"{p.pid} {p.name()}" for p in alive]
        for process in alive:
            process.kill()
        return code, left

    def pdserve(self, *args: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Runs a pdserve command against it."""
        return subprocess.run(
            [*self.within, PDSERVE, *args],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(
            self.grpc_address, options=[("grpc.max_send_message_length", 128 << 20)]
        )

    def view(self) -> operator_pb2.GetClusterResponse:
        token = (self.folder / "run" / self.name / "operator").read_text()
        with grpc.insecure_channel(self.operator_address) as channel:
            return operator_pb2_grpc.OperatorStub(channel).GetCluster(
                operator_pb2.GetClusterRequest(),
                timeout=20,
                metadata=[("authorization", f"Bearer {token}")],
            )

    def _note(self, state: dict[str, str]) -> None:
        self.grpc_address, self.http_address = state["grpc_address"], state["http_address"]
        self.operator_address = state["operator_address"]

    def wait_idle(self, seconds: float = 20) -> None:
        """Asserts promise I3 on both pools: nothing pinned, no block held."""
        deadline = time.monotonic() + seconds
        while True:
            workers = self.view().workers
            held = {  # blocks pinned, bytes pinned, blocks used
                w.worker_id: (w.pinned_blocks, w.pinned_bytes, w.engine_blocks_used)
                for w in workers
            }
            running = sum(w.running_sequences for w in workers)
            if not running and all(not any(counts) for counts in held.values()):
                return
            assert time.monotonic() < deadline, f"still held: {held}, running {running}"
            time.sleep(0.2)


def generate(
    channel: grpc.Channel,
    prompt: str | list[int],
    sampling: common_pb2.SamplingParams,
    timeout: float = 120,
    **fields: object,
) -> Answer:
    """Runs one request to its end and checks promise I4: offsets never skip or repeat."""
    request = inference_pb2.GenerateRequest(sampling=sampling, **fields)  # type: ignore[arg-type]
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    completions: dict[int, Completion] = {}
    completed = None
    for message in stream(channel, request, timeout):
        assert completed is None, "a message after the last"
        if message.WhichOneof("event") == "completed":
            completed = message.completed
            continue
        delta = message.delta
        got = completions.setdefault(delta.index, Completion())
        assert not got.finish_reason, "a token after the end"
        assert delta.offset == len(got.token_ids), "an offset skipped or repeated"
        got.token_ids += delta.token_ids
        got.text += delta.text
        got.logprobs += delta.logprobs
        got.finish_reason = delta.finish_reason
        if kind := delta.WhichOneof("stop"):
            got.stop = getattr(delta, kind)
    assert completed is not None, "no last message"
    assert all(c.finish_reason for c in completions.values())
    return Answer(completions, completed)


def stream(
    channel: grpc.Channel, request: inference_pb2.GenerateRequest, timeout: float
) -> Iterator[inference_pb2.GenerateResponse]:
    yield from inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)


def registered(cluster: RunningCluster) -> dict[str, WorkerRecord]:
    """The registry's workers, read from the cluster's own store."""

    async def read() -> dict[str, WorkerRecord]:
        url = (cluster.folder / "run" / cluster.name / "store_url").read_text()
        client = await connect(url, timeout=5)
        try:
            workers = await Registry(client, cluster.name).workers()
        finally:
            await client.aclose()
        return {worker.worker_id: worker for worker in workers}

    return asyncio.run(read())
