"""`pdserve profile`: a short calibration run against a running cluster, through its own API.

What the workers report of their own phases is what is kept, and apart from it what a request takes
outside of them, and what workers on the same cores take from each other.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.cli.profile_run import Run
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.errors import InvalidRequest
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import hardware
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape


@dataclass(frozen=True)
class Wanted:
    """The command line's options.

    Attributes:
        model, gpu, tensor_parallel: what the profile is of, as `pdserve plan` names it.
        served: as the cluster calls the model; empty: the only one.
        max_prompt, max_batch: the largest measured.
        shared: prefill and decode workers run on the same cores.
    """

    model: str
    gpu: str
    tensor_parallel: int
    served: str
    max_prompt: int
    max_batch: int
    out: Path
    shared: bool = False


def run(terminal: Terminal, address: str, token: str, wanted: Wanted, as_json: bool) -> int:
    """Measures, fits, and writes the profile; says how far the fit is off."""
    shape, gpu = load_shape(wanted.model), hardware(wanted.gpu)
    _write(wanted.out, "", "a")  # else a minute of measuring would be lost
    with terminal.err.status("measuring") as status:
        run = Run(wanted.served, wanted.max_prompt, wanted.max_batch, wanted.shared, status.update)
        asyncio.run(run.measure(address, token))
    profile = Profile(
        shape.name,
        gpu.name,
        wanted.tensor_parallel,
        tuple(run.prefill),
        tuple(run.decode),
        tuple(run.handoff),
        tuple(run.path),
        tuple(run.shared),
        run.chunk,
        run.ahead,
        run.graph_tokens,
        tuple(run.launch),
    )
    fitted = calibrate(roofline(shape, gpu, wanted.tensor_parallel), profile)
    _write(wanted.out, profile.to_json() + "\n", "w")
    errors = {
        "prefill": {"median": fitted.prefill_error.median, "p90": fitted.prefill_error.p90},
        "decode": {"median": fitted.decode_error.median, "p90": fitted.decode_error.p90},
    }
    counts = {
        kind: len(getattr(profile, kind))
        for kind in ("prefill", "decode", "handoff", "shared", "launch")
    }
    slowed = fitted.performance.contention
    if as_json:
        out = {"profile": str(wanted.out), "samples": counts, "errors": errors}
        terminal.json({**out, "contention": asdict(slowed)})
    else:
        spoken = ", ".join(f"{n} of {kind}" for kind, n in counts.items())
        terminal.out.print(f"{wanted.out}: samples: {spoken}", markup=False)
        for kind, off in errors.items():
            terminal.out.print(
                f"{kind}: the fit is off by {off['median']:.1%} (median), {off['p90']:.1%} "
                "(p90) where it was not told",
                markup=False,
            )
        if wanted.shared:
            terminal.out.print(
                f"beside another worker's steps prompts take {slowed.prefill:.2f} times as long, "
                f"decodes {slowed.decode:.2f} times; decode's steps lose {slowed.handoff * 1e3:.1f}"
                " ms to a handoff",
                markup=False,
            )
    return EXIT_OK


def _write(out: Path, text: str, mode: str) -> None:
    try:
        with out.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise InvalidRequest("OUT", f"{out} cannot be written: {error.strerror}") from error
