"""`pdserve generate`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from cluster.cli.access import channel
from cluster.cli.calls import Delta, Prompt, generate
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.cli.timeline import Served, show


def run(
    terminal: Terminal, address: str, prompt: Prompt, stream: bool, timeline: bool, as_json: bool
) -> int:
    """Prints the text as it comes, or all at once; then the timeline."""
    return asyncio.run(_run(terminal, address, prompt, stream and not as_json, timeline, as_json))


async def _run(
    terminal: Terminal, address: str, prompt: Prompt, stream: bool, timeline: bool, as_json: bool
) -> int:
    text, finish, served = "", "", None
    async with channel(address) as to:
        async for item in generate(to, prompt):
            match item:
                case Delta():
                    text += item.text
                    finish = item.finish_reason or finish
                    if stream:
                        terminal.out.print(item.text, end="", markup=False)
                        terminal.out.file.flush()
                case Served():
                    served = item
    if as_json:
        report = asdict(served) if served is not None else None
        terminal.json({"text": text, "finish_reason": finish, "report": report})
        return EXIT_OK
    terminal.out.print("" if stream else text, markup=False)
    if timeline and served is not None:
        show(terminal.err, served)
    return EXIT_OK
