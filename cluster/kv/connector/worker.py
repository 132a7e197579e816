"""The connector's half in the engine's worker process: next to the KV cache, one per rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.kv.agent import HandoffAgent
from cluster.kv.connector.step import StepMetadata
from cluster.kv.handoff import HandoffResult
from cluster.kv.layout import KvLayout
from cluster.kv.mailbox import Finished
from cluster.kv.paged import PagedCache
from cluster.ticket import TicketSigner

if TYPE_CHECKING:
    from cluster.kv.sender import Offer

SECRET_ENV = "PDSERVE_KV_SECRET"
"""Where a worker puts the cluster's secret for its engine processes, in hex."""


@dataclass(frozen=True)
class ConnectorConfig:
    """The connector's part of vLLM's `kv_connector_extra_config`."""

    worker_id: str
    incarnation: str
    model_digest: str
    host: str
    max_message_bytes: int
    max_streams: int


class WorkerSide:
    """Starts the handoff agent on the registered cache and relays between it and the engine."""

    def __init__(
        self, config: ConnectorConfig, rank: int, ranks: int, backend: str, vocab_size: int
    ) -> None:
        self._config = config
        self._rank = rank
        self._ranks = ranks
        self._backend = backend
        self._vocab_size = vocab_size
        self._layers: dict[str, int] = {}
        self._offers: tuple[Offer, ...] = ()
        self._cache: PagedCache | None = None
        self.agent: HandoffAgent | None = None
        self.layout: KvLayout | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The caches are there: open the transfer port."""
        cache = self._cache = PagedCache(kv_caches)
        self._layers = {name: i for i, name in enumerate(cache.layer_names)}
        config = self._config
        self.layout = KvLayout(
            model_digest=config.model_digest,
            dtype=str(cache.dtype).removeprefix("torch."),
            item_bytes=cache.item_bytes,
            num_layers=cache.num_layers,
            heads=cache.heads,
            tokens=cache.tokens,
            content=cache.content,
            backend=self._backend,
            ranks=self._ranks,
        )
        self.agent = HandoffAgent(
            cache,
            TicketSigner(bytes.fromhex(os.environ[SECRET_ENV])),
            config.worker_id,
            config.incarnation,
            self.layout.fingerprint(),
            self._rank,
            config.host,
            config.max_message_bytes,
            config.max_streams,
            self._vocab_size,
        )
        self.agent.start()

    def begin_step(self, step: StepMetadata) -> None:
        """Passes on what the scheduler's half decided, before the step's compute."""
        self._offers = step.offers
        if self.agent is None or step == StepMetadata():
            return
        sender, receiver = self.agent.sender, self.agent.receiver

        def apply() -> None:
            for handoff_id in step.preempted:
                sender.fail(handoff_id)
            for release in step.sent:
                sender.release(release)
            for handoff_id in step.received:
                receiver.release(handoff_id)
            for offer in step.offers:
                sender.offer(offer)
            for reserve in step.reserves:
                receiver.reserve(reserve)

        self.agent.post(apply)

    def layer_written(self, layer_name: str) -> None:
        """The step's KV of a layer is in the cache, or on its way there on the device."""
        if self._offers and self.agent is not None:
            sender, layer, offers = self.agent.sender, self._layers[layer_name], self._offers
            fence = self._cache.fence() if self._cache else None
            self.agent.post(lambda: sender.layer_ready(layer, offers, fence))

    def end_step(self) -> None:
        self._offers = ()

    def take_finished(self) -> Finished:
        return self.agent.mailbox.take_finished() if self.agent else Finished()

    def take_results(self) -> list[HandoffResult]:
        return self.agent.mailbox.take_results() if self.agent else []

    def stop(self) -> None:
        if self.agent is not None:
            self.agent.stop()
