"""The store as a router uses it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from cluster.config import Config
from cluster.store import client as store_client
from cluster.store import journal as store_journal
from cluster.store import registry as store_registry
from cluster.store.batches import Batches
from cluster.store.cancellations import Cancellations
from cluster.store.files import Files
from cluster.store.plans import Plans
from cluster.store.streams import Streams
from router.batch.assemble import BatchStore
from router.observe import Journal
from router.workers import Registry


@dataclass(frozen=True)
class Store:
    """Its parts. Without streams nothing is resumable, without batch there are no batch jobs,
    without plans nothing is planned, without cancellations each router cancels its own."""

    registry: Registry
    journal: Journal
    streams: Streams | None = None
    batch: BatchStore | None = None
    plans: Plans | None = None
    cancellations: Cancellations | None = None


async def connect(config: Config, url: str, stack: contextlib.AsyncExitStack) -> Store:
    """The store at `url`, until `stack` is closed. Raises Unavailable if it does not answer."""
    client = await store_client.connect(url, config.store.connect_timeout_seconds)
    stack.push_async_callback(client.aclose)
    name = config.name
    most = config.batch.max_stored_bytes
    return Store(
        store_registry.Registry(client, name),
        store_journal.Journal(client, name),
        Streams(client, name),
        BatchStore(Batches(client, name, most), Files(client, name, most)),
        Plans(client, name),
        Cancellations(client, name),
    )
