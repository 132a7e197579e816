"""`pdserve simulate`: one deployment under a trace."""

from __future__ import annotations

import math
from collections import Counter

from cluster.cli.plan import Asked, ask
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.errors import InvalidRequest
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Percentiles, attainment, tpot, ttft
from cluster.simulator.workload import at_rate, mean_rate
from cluster.simulator.world import World


def run(
    terminal: Terminal,
    asked: Asked,
    workers: tuple[int, int, int],
    rate: float | None,
    as_json: bool,
) -> int:
    """Replays the trace against `workers` (prefill, decode, both), at its own rate or another."""
    prefill, decode, both = workers
    if not both and not (prefill and decode):
        raise InvalidRequest("workers", "give --both, or --prefill and --decode, at least 1 each")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise InvalidRequest("rate", f"{rate:g} is not a rate")
    question, _ = ask(asked)
    arrivals = question.arrivals if rate is None else at_rate(question.arrivals, rate)
    deployment = Deployment(
        question.performance,
        prefill,
        decode,
        both,
        question.limits,
        block_tokens=arrivals[0].block_tokens,
    )
    world = World(deployment, asked.seed)
    with terminal.err.status("simulating") as status:
        outcomes = world.run(
            arrivals, progress=lambda done: status.update(f"simulated {done}/{len(arrivals)}")
        )
    busy = {w.worker_id: w.engine.busy_seconds for w in world.fleet.workers.values()}
    first, gap = ttft(outcomes), tpot(outcomes)
    result = {
        "workers": {"prefill": prefill, "decode": decode, "both": both},
        "requests": len(outcomes),
        "rate": mean_rate(arrivals),
        "attainment": attainment(outcomes, question.goal.targets),
        "ttft": _values(first),
        "tpot": _values(gap),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "cached_prompt_tokens": sum(o.cached for o in outcomes),
        "gpu_seconds": world.fleet.gpu_seconds(),
        "busy": {name: seconds / world.agenda.now for name, seconds in busy.items()},
    }
    if as_json:
        terminal.json(result)
        return EXIT_OK
    terminal.out.print(
        f"{deployment}, {len(outcomes)} requests at {result['rate']:.2f}/s: "
        f"{result['attainment']:.1%} met their targets\n"
        f"TTFT p50/p90/p99 {first.p50 * 1e3:.0f}/{first.p90 * 1e3:.0f}/{first.p99 * 1e3:.0f} ms, "
        f"TPOT {gap.p50 * 1e3:.1f}/{gap.p90 * 1e3:.1f}/{gap.p99 * 1e3:.1f} ms",
        markup=False,
    )
    for error, count in Counter(o.error for o in outcomes if o.error).most_common():
        terminal.out.print(f"{count} × {error}", markup=False)
    return EXIT_OK


def _values(values: Percentiles) -> dict[str, float | None]:
    named = {"p50": values.p50, "p90": values.p90, "p99": values.p99}
    return {name: value if math.isfinite(value) else None for name, value in named.items()}
