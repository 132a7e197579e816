"""The connector's half in the engine's worker process: next to the KV cache, one per rank."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from cluster.kv.agent import HandoffAgent
from cluster.kv.connector import going_on, near
from cluster.kv.connector.describe import describe
from cluster.kv.connector.step import StepMetadata, StepReport
from cluster.kv.doorkeeper import Terms
from cluster.kv.generations import Stamp
from cluster.kv.handoff import HandoffResult
from cluster.kv.layout import KvLayout
from cluster.kv.mailbox import Finished
from cluster.kv.orders import told_size
from cluster.kv.transport.choose import TransportOptions
from cluster.ticket import TicketSigner

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from cluster.kv.sender import Offer

SECRET_ENV = "PDSERVE_KV_SECRET"
"""Where a worker puts the cluster's secret for its engine processes, in hex."""


READ_SECONDS = 1.0
"""A step waits no longer for its blocks to be read: handoffs that take longer are called off."""


OUT_OF_WINDOW = 0
"""vLLM's null block, which stands for every block that no window reaches any more, in all requests
at once: it is never handed out, and what is written to it is never read."""


@dataclass(frozen=True)
class ConnectorConfig:
    """The connector's part of vLLM's `kv_connector_extra_config`.

    Attributes:
        transport: the fields of `TransportOptions`.
        max_ahead_bytes: KV that prefill may pin ahead of grants.
    """

    worker_id: str
    incarnation: str
    model_digest: str
    transport: dict[str, Any]
    max_ahead_bytes: int


@dataclass
class _Step:
    """One engine step's work on layers.

    Attributes:
        layer_bytes: what the offers have of one layer.
        written: layers that the engine has computed, or queued.
        untold: those that the agent has not been told of.
    """

    offers: tuple[tuple[Offer, Stamp], ...] = ()
    layer_bytes: int = 0
    written: set[int] = field(default_factory=set)
    untold: list[int] = field(default_factory=list)


class WorkerSide:
    """Starts the handoff agent on the registered cache and relays between it and the engine.

    Args:
        kept: see `PagedCache`.
    """

    def __init__(self, config: ConnectorConfig, vllm_config: VllmConfig, kept: bool = True) -> None:
        self._kept = kept
        self._config = config
        self._vllm_config = vllm_config
        self._layers: dict[str, int] = {}
        self._step = _Step()
        self._first_tokens: dict[str, int] = {}
        self.agent: HandoffAgent | None = None
        self.layout: KvLayout | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The caches are there: open the transfer port."""
        cache, geometry = describe(self._vllm_config, kv_caches, self._kept)
        self.cache = cache
        self._layers = {name: i for i, name in enumerate(cache.layer_names)}
        config = self._config
        self.layout = KvLayout(
            model_digest=config.model_digest,
            dtype=str(cache.dtype).removeprefix("torch."),
            num_layers=cache.num_layers,
            content=cache.content,
            geometry=geometry,
        )
        self.agent = HandoffAgent(
            cache,
            TicketSigner(bytes.fromhex(os.environ[SECRET_ENV])),
            Terms(
                config.worker_id,
                config.incarnation,
                self.layout.fingerprint(),
                geometry,
                get_tensor_model_parallel_rank(),
            ),
            self._vllm_config.model_config.get_vocab_size(),
            TransportOptions(**config.transport),
        )
        self.agent.start()
        going_on.install(self._vllm_config.model_config.use_fp64_gumbel)
        if geometry.ranks == 1:
            near.announce(self.agent)

    def begin_step(self, step: StepMetadata) -> None:
        """Passes on what the scheduler's half decided, before the step's compute."""
        if self.agent is None or step == StepMetadata():
            self._step = _Step()
            return
        sender, receiver = self.agent.sender, self.agent.receiver
        free = self.cache.fence() if step.reserves else None
        generations = self.agent.generations
        generations.renew(step.allocated)
        reserves = []
        for reserve in step.reserves:
            owed = reserve.block_ids[reserve.held_tokens // self.cache.tokens :]
            generations.renew([block for block in owed if block != OUT_OF_WINDOW])
            reserves.append((reserve, generations.stamp(reserve.block_ids)))
        blocks = sum(len(offer.block_ids) for offer in step.offers)
        self._step = _Step(
            tuple((offer, generations.stamp(offer.block_ids)) for offer in step.offers),
            blocks * self.cache.block_bytes,
        )

        def apply() -> None:
            # Beginnings before ends: a request may have come and gone between two steps.
            for arrival in step.arrivals:
                sender.arrive(arrival)
            for handoff_id in step.preempted:
                sender.fail(handoff_id)
            for offer in step.offers:
                sender.offer(offer)
            for release in step.sent:
                sender.release(release)
            for reserve, stamp in reserves:
                receiver.reserve(reserve, stamp, free)
            for handoff_id in step.received:
                receiver.release(handoff_id)

        self.agent.post(apply)

    def layer_written(self, layer_name: str) -> None:
        """The step's KV of a layer is in the cache, or on its way there on the device."""
        step = self._step
        if step.offers:
            self._written(self._layers[layer_name])
            assert self.agent is not None
            if len(step.untold) * step.layer_bytes >= self._told_bytes:
                self._tell()

    @property
    def _told_bytes(self) -> int:
        assert self.agent is not None
        return told_size(self.agent.frame_bytes, self._step.layer_bytes * len(self._layers))

    def step_written(self) -> None:
        """So is that of every layer: of those too that ran inside a CUDA graph, unannounced."""
        if self._step.offers:
            for layer in self._layers.values():
                if layer not in self._step.written:
                    self._written(layer)
            self._tell()
            if not self._kept:
                self._wait_until_read()

    def _wait_until_read(self) -> None:
        """The next step may hand the blocks out anew that have left the window."""
        assert self.agent is not None
        sender, read = self.agent.sender, threading.Event()
        handoffs = [offer.handoff_id for offer, _ in self._step.offers]
        self.agent.post(lambda: sender.when_read(handoffs, read.set))
        if not read.wait(READ_SECONDS):
            self.agent.post(lambda: sender.fail_unread(handoffs))

    def _written(self, layer: int) -> None:
        self._step.written.add(layer)
        self._step.untold.append(layer)

    def _tell(self) -> None:
        """The agent hears of several layers at once: each call takes time from the engine, which
        is queuing the next layers."""
        layers, self._step.untold = self._step.untold, []
        if not layers:
            return
        assert self.agent is not None
        sender, offers, fence = self.agent.sender, self._step.offers, self.cache.fence()

        def apply() -> None:
            for layer in layers:
                sender.layer_ready(layer, offers, fence)

        self.agent.post(apply)

    def end_step(self) -> None:
        self._step = _Step()

    def take_finished(self) -> Finished:
        finished = self.agent.mailbox.take_finished() if self.agent else Finished()
        self._first_tokens |= finished.first_tokens
        return finished

    def take_results(self) -> list[HandoffResult]:
        return self.agent.mailbox.take_results() if self.agent else []

    def take_report(self) -> StepReport | None:
        """None if there is nothing to say. What has finished is taken before."""
        granted = self.agent.mailbox.take_granted() if self.agent else []
        landed, self._first_tokens = self._first_tokens, {}
        return StepReport(set(granted), landed) if granted or landed else None

    def stop(self) -> None:
        if self.agent is not None:
            near.forget()
            self.agent.stop()
