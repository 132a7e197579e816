"""`pdserve record`: the cluster's requests as a trace – arrivals, lengths, prefix hashes, classes,
and no text – and the journal's past for `pdserve plan --from-cluster`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from cluster.cli.access import channel
from cluster.cli.calls import cluster_view
from cluster.cli.plan_calls import RequestSeen, requests_seen
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.errors import InvalidRequest, NotFound
from cluster.simulator.workload import Arrival

PAST_TIMEOUT = 60.0


def run(terminal: Terminal, address: str, token: str, out: Path, seconds: float, model: str) -> int:
    """Writes what ends within so many seconds, at all routers."""
    kept: list[RequestSeen] = []
    left_out = 0
    # First, so that a file that is there outlives a cluster that does not answer.
    routers = asyncio.run(_routers(address, token))
    try:
        with out.open("w") as file, terminal.err.status("recording") as status:

            def take(seen: RequestSeen) -> None:
                nonlocal left_out
                if seen.output < 1:
                    left_out += 1
                elif not model or seen.model == model:
                    kept.append(seen)
                    file.write(line(seen) + "\n")
                    status.update(f"recorded {len(kept)} requests")

            asyncio.run(_follow(routers, token, seconds, take))
    except OSError as error:
        raise InvalidRequest("OUT", f"{out} cannot be written: {error.strerror}") from error
    said = f"; {left_out} that got no token were left out" if left_out else ""
    terminal.out.print(f"{out}: {len(kept)} requests{said}", markup=False)
    return EXIT_OK


def line(seen: RequestSeen) -> str:
    """A request as `read_trace` reads it."""
    return json.dumps(
        {
            "at": round(seen.at, 6),
            "prompt": seen.prompt,
            "output": seen.output,
            "blocks": list(seen.blocks),
            "block_tokens": seen.block_tokens,
            "kind": seen.slo_class,
        },
        separators=(",", ":"),
    )


def past(address: str, token: str, seconds: float, model: str) -> tuple[Arrival, ...]:
    """The requests of the journal that came within so many seconds, without their prefixes.

    Raises:
        NotFound: there are several models, and none was named.
    """

    async def read() -> list[RequestSeen]:
        async with channel(address, token) as to:
            return [seen async for seen in requests_seen(to, seconds, False, PAST_TIMEOUT)]

    seen = [each for each in asyncio.run(read()) if each.output >= 1]
    names = sorted({each.model for each in seen})
    if not model and len(names) > 1:
        raise NotFound(f"--served: the cluster's requests are for {', '.join(names)}: name one")
    return tuple(
        Arrival(each.at, each.prompt, each.output, kind=each.slo_class)
        for each in seen
        if model in ("", each.model)
    )


async def _routers(address: str, token: str) -> list[str]:
    async with channel(address, token) as to:
        view = await cluster_view(to)
    # The one that was asked goes by the address that reached it: others may know it by another.
    return [address, *(r.operator_address for r in view.routers[1:])]


async def _follow(
    routers: list[str], token: str, seconds: float, take: Callable[[RequestSeen], None]
) -> None:
    async def follow(at: str) -> None:
        async with channel(at, token) as to:
            async for seen in requests_seen(to, 0.0, True, seconds):
                take(seen)

    await asyncio.gather(*map(follow, routers))
