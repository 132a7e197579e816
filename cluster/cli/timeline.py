"""Where a request's milliseconds went, as text."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

PHASES = (
    "queue",
    "prefill_queue",
    "prefill",
    "handoff_wait",
    "decode_queue",
    "first_step",
    "decode",
)
BAR_COLUMNS = 32
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Handoff:
    """One KV handoff. `seconds` from first to last byte."""

    transport: str
    bytes: int
    blocks: int
    messages: int
    held_tokens: int
    seconds: float


@dataclass(frozen=True)
class Served:
    """How one completion was served. Phases in seconds, by name."""

    prefill_worker: str
    decode_worker: str
    phases: dict[str, float]
    handoff: Handoff | None
    ttft_seconds: float
    tpot_seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def show(console: Console, served: Served) -> None:
    """The phases as bars on one scale, then who served it and what moved."""
    longest = max([*served.phases.values(), 1e-9])
    for name in PHASES:
        seconds = served.phases.get(name, 0.0)
        line = f"  {name:<14}{seconds * 1000:9.1f} ms  {bar(seconds / longest)}"
        console.print(line.rstrip(), markup=False)
    cached = f" ({served.cached_tokens} from the prefix cache)" if served.cached_tokens else ""
    console.print(
        f"  {served.prompt_tokens} prompt tokens{cached}, {served.output_tokens} generated; "
        f"TTFT {served.ttft_seconds * 1000:.1f} ms, TPOT {served.tpot_seconds * 1000:.1f} ms"
    )
    if served.decode_worker and served.decode_worker != served.prefill_worker:
        console.print(f"  prefill on {served.prefill_worker}, decode on {served.decode_worker}")
    else:
        console.print(f"  on {served.prefill_worker or served.decode_worker} alone")
    if (moved := served.handoff) is not None:
        console.print(
            f"  KV handoff: {spoken_bytes(moved.bytes)} over {moved.transport} in "
            f"{moved.blocks} blocks and {moved.messages} messages, {moved.seconds * 1000:.1f} ms; "
            f"decode already held {moved.held_tokens} tokens"
        )


def bar(share: float, columns: int = BAR_COLUMNS) -> str:
    """A bar of `share` (0 to 1) of `columns`; anything above 0 shows."""
    eighths = round(min(max(share, 0.0), 1.0) * columns * 8)
    if share > 0:
        eighths = max(eighths, 1)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def spoken_bytes(count: int) -> str:
    """With a binary unit: 1536 is 1.5 KiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
