"""The arguments of `pdserve plan` and `pdserve simulate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.cli.steer_app import Address, Json, Name
from cluster.cli.terminal import Terminal
from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.simulator.workload import Arrival

TRACE_HELP = "Azure's CSV, Mooncake's JSON lines, or our own request log."
Trace = Annotated[Path, typer.Option(help=TRACE_HELP)]
Model = Annotated[str, typer.Option(help="A known model's name, or a directory with config.json.")]
Gpu = Annotated[str, typer.Option(help="A100, H100, H200, B200, L40S or CPU.")]
Slo = Annotated[str, typer.Option(help="Targets in seconds: ttft=0.5,tpot=0.05")]
Share = Annotated[float, typer.Option(help="Of all requests that are to meet them.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="GPUs per worker.")]
Chunk = Annotated[int, typer.Option(min=32, help="Tokens per engine step.")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="What a worker was measured to take.")
]
Where = Callable[[str | None, str | None], str]


def add_planning(app: typer.Typer, terminal: Terminal, where: Where, token: Where) -> None:
    """Adds the commands to `app`. Arguments as `add_steering`'s."""

    @app.command()
    def plan(
        model: Model,
        gpu: Gpu,
        gpus: Annotated[int, typer.Option(help="GPUs in all.")],
        slo: Slo,
        trace: Annotated[Path | None, typer.Option(help=TRACE_HELP)] = None,
        from_cluster: Annotated[
            bool,
            typer.Option("--from-cluster", help="The cluster's requests, instead."),
        ] = False,
        past: Annotated[float, typer.Option(min=1, help="Seconds of them.")] = 3600.0,
        served: Annotated[str, typer.Option(help="The model, as the cluster calls it.")] = "",
        share: Share = 0.9,
        tensor_parallel: TensorParallel = 1,
        chunk: Chunk = 2048,
        price: Annotated[
            float | None, typer.Option(min=0, help="Dollars per GPU and hour.")
        ] = None,
        profile: ProfileFile = None,
        seed: Annotated[int, typer.Option()] = 0,
        plot: Annotated[Path | None, typer.Option(help="Directory for four SVG plots.")] = None,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Which prefill:decode ratio, or none at all, serves this traffic best on these GPUs."""
        from cluster.cli import plan as command

        if (trace is not None) == from_cluster:
            raise InvalidRequest("trace", "give --trace FILE, or --from-cluster")
        traffic: Path | tuple[Arrival, ...]
        if trace is None:
            from cluster.cli.record import past as past_of

            at, shown = where(address, name), token(address, name)
            traffic = past_of(at, shown, past, served)
        else:
            traffic = trace
        asked = command.Asked(
            traffic, model, gpu, gpus, slo, share, tensor_parallel, chunk, price, profile, seed
        )
        _exit(command.run(terminal, asked, plot, as_json))

    @app.command()
    def simulate(
        trace: Trace,
        model: Model,
        gpu: Gpu,
        slo: Slo,
        prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 0,
        decode: Annotated[int, typer.Option(min=0, help="Decode workers.")] = 0,
        both: Annotated[int, typer.Option(min=0, help="Workers of both roles.")] = 0,
        rate: Annotated[float | None, typer.Option(help="Requests/s; unset: its own.")] = None,
        tensor_parallel: TensorParallel = 1,
        chunk: Chunk = 2048,
        profile: ProfileFile = None,
        seed: Annotated[int, typer.Option()] = 0,
        as_json: Json = False,
    ) -> None:
        """Replay a trace against simulated workers."""
        from cluster.cli import simulate as command
        from cluster.cli.plan import Asked

        workers = (prefill, decode, both)
        gpus = sum(workers) * tensor_parallel
        asked = Asked(
            trace, model, gpu, gpus, slo, 0.9, tensor_parallel, chunk, None, profile, seed
        )
        _exit(command.run(terminal, asked, workers, rate, as_json))


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)
