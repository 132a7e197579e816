"""What every process of a cluster is given at its start. Does not import Ray: Ray's core reads its
environment when it is imported, and `runtime` sets that first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config

WORKER_BODY = "cluster.control.compose:worker_host"
ROUTER_BODY = "router.server:RouterServer"


@dataclass(frozen=True)
class Launch:
    """What every life of a cluster is given. Holds secrets: never print or log it.

    Attributes:
        embedded: everything is on this host and stays on loopback.
        log_dir: `<slot>.log` in it takes stdout and stderr; None: Ray's own directory for logs, on
            whichever host the life is.
        omp_num_threads: the user's own setting, which Ray overwrites in actors.
        worker_body, router_body: `module:factory`, imported in the actor.
    """

    config: Config
    secret: bytes
    store_url: str
    log_dir: Path | None
    embedded: bool = True
    omp_num_threads: str | None = None
    worker_body: str = WORKER_BODY
    router_body: str = ROUTER_BODY

    def __repr__(self) -> str:
        return f"Launch({self.config.name})"
