"""File descriptors: every connection takes one, and a process may have only so many."""

from __future__ import annotations

import logging
import resource

SPARE = 256
"""For the workers' links, the store, logs and files."""

log = logging.getLogger(__name__)


def allow(connections: int) -> bool:
    """Raises this process's limit so that it can hold so many connections, as far as it may.

    False, and a warning that says what to do, if that is too few: then clients beyond it wait
    unaccepted until others have gone.
    """
    needed = connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return True
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= needed:
        return True
    log.warning(
        "this process may open %d files, and %d requests at once, each on a connection of its own, "
        "would take %d: raise the hard limit (ulimit -Hn, LimitNOFILE=, a container's ulimits) or "
        "lower router.max_running_requests and router.max_queued_requests",
        allowed,
        connections,
        needed,
    )
    return False
