"""Lists of lines, written in parts before what they belong to, and room for them.

A part is written once, also when its answer is lost and it comes again. Until its owner – a job, a
file – is there a list expires, so that what broke off on the way is not kept for ever; the script
that writes the owner makes it stay, and counts its bytes in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from cluster.errors import Overloaded
from cluster.store.client import store_errors

UNOWNED_SECONDS = 3600
_PUSH_LINES = 2000

# KEYS: list. ARGV: seconds, lines before these, lines.
_PUSH = """
for i = 3 + redis.call('LLEN', KEYS[1]) - tonumber(ARGV[2]), #ARGV do
  redis.call('RPUSH', KEYS[1], ARGV[i])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""


class Lines:
    """Writes lists, and knows what there is room for.

    Args:
        max_bytes: that jobs, their results and files take together.
    """

    def __init__(self, client: Redis, cluster_name: str, max_bytes: int) -> None:
        self._client: Any = client
        self.counter = f"pdserve:{{{cluster_name}}}:batch-bytes"
        self.max_bytes = max_bytes
        self._push = client.register_script(_PUSH)

    async def write(self, key: str, lines: Sequence[str]) -> None:
        """Writes a list that nobody owns yet. Raises Unavailable."""
        with store_errors():
            for start in range(0, len(lines), _PUSH_LINES):
                part = lines[start : start + _PUSH_LINES]
                await self._push(keys=[key], args=[UNOWNED_SECONDS, start, *part])

    async def check_room(self, size: int) -> None:
        """Before work is spent on what there is no room for. Raises Overloaded, Unavailable."""
        with store_errors():
            taken = int(await self._client.get(self.counter) or 0)
        if taken + size > self.max_bytes:
            raise self.full()

    def full(self) -> Overloaded:
        """What is raised then."""
        return Overloaded(
            f"batch.max_stored_bytes: jobs and files take {self.max_bytes} bytes; "
            "delete files, or wait until finished jobs are dropped",
            60.0,
        )
