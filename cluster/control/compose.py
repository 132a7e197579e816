"""Puts a worker together: an engine behind the prefill, the decode and the whole face."""

from __future__ import annotations

import os
from collections.abc import Callable

from cluster.config import Config, ModelConfig
from cluster.engine.protocol import Engine
from cluster.store.registry import Registry
from cluster.ticket import TicketSigner
from cluster.worker.host import Faces, WorkerHost
from cluster.worker.sequence import Identity, Stage
from cluster.worker.whole import WholeFace
from decode_worker.servicer import DecodeFace
from prefill_worker.peers import Peers
from prefill_worker.servicer import PrefillFace


def worker_host(
    config: Config,
    model_name: str,
    worker_id: str,
    incarnation: str,
    role: str,
    secret: bytes,
    store_url: str,
    bind_host: str,
) -> WorkerHost:
    """A worker with the engine that its model names. Arguments as WorkerHost's."""

    def make_engine(
        model: ModelConfig, worker_id: str, incarnation: str, secret: bytes, host: str
    ) -> Engine:
        if model.engine == "simulated":
            from cluster.engine.simulated.engine import SimulatedEngine

            return SimulatedEngine(model, worker_id, incarnation, secret, host)
        from cluster.engine.vllm import VllmEngine  # seconds, and gigabytes of torch

        threads = engine_threads(config, model, role)
        return VllmEngine(model, config.handoff, worker_id, incarnation, secret, host, threads)

    def make_faces(
        engine: Engine, me: Identity, signer: TicketSigner, registry: Registry
    ) -> Callable[[str], Faces]:
        made: Faces = {"whole": WholeFace(engine), "decode": DecodeFace(engine, me, signer)}

        def faces(role: str) -> Faces:
            if role != "decode" and "prefill" not in made:  # its view of the peers costs a task
                made["prefill"] = PrefillFace(engine, me, signer, Peers(registry))
            stages: tuple[Stage, ...] = ("prefill", "decode") if role == "both" else (_stage(role),)
            return {stage: made[stage] for stage in ("whole", *stages)}

        return faces

    return WorkerHost(
        config,
        model_name,
        worker_id,
        incarnation,
        role,
        secret,
        store_url,
        bind_host,
        make_engine,
        make_faces,
    )


def _stage(role: str) -> Stage:
    return "prefill" if role == "prefill" else "decode"


def engine_threads(config: Config, model: ModelConfig, role: str) -> int:
    """CPU threads for an engine without a GPU: what its pool reserves, or this host's share.

    Engines that share cores must not spin on more threads than there are.
    """
    pool = model.prefill if role == "prefill" else model.decode
    if pool.num_cpus >= 1:
        return int(pool.num_cpus)
    engines = sum(m.prefill.replicas + m.decode.replicas for m in config.models)
    return max(1, (os.cpu_count() or 1) // max(1, engines))
