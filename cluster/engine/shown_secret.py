"""The cluster's secret in the environment of an engine's processes, while they are started."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.kv.connector.worker import SECRET_ENV

_lock = threading.Lock()
_starting = 0


@contextmanager
def shown(secret: bytes) -> Iterator[None]:
    """What is started meanwhile finds the secret; nothing does that is started later.

    Several engines of one process may start at a time: the last of them takes it away.
    """
    global _starting
    with _lock:
        _starting += 1
        os.environ[SECRET_ENV] = secret.hex()
    try:
        yield
    finally:
        with _lock:
            _starting -= 1
            if not _starting:
                os.environ.pop(SECRET_ENV, None)
