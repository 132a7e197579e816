"""The arguments of `pdserve top` and `pdserve bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.cli.plan_app import TRACE_HELP
from cluster.cli.steer_app import Address, Json, Name, Where
from cluster.cli.terminal import Terminal

Router = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="host:port of a router's gRPC, or several: a:1,b:1. Unset: all routers of the cluster "
        "that runs here.",
    ),
]


def add_watching(
    app: typer.Typer, terminal: Terminal, where: Where, operator: Where, token: Where
) -> None:
    """Adds the commands to `app`.

    Args:
        where: the address of a router, from --address and --name.
        operator, token: of its Operator API, likewise.
    """

    @app.command()
    def top(
        interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
        once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
        name: Name = None,
        address: Address = None,
        as_json: Annotated[bool, typer.Option("--json", help="A line of JSON a look.")] = False,
    ) -> None:
        """Watch pools, workers and routers: KV, tokens/s, a minute's latencies. q ends it."""
        from cluster.cli import top as command

        at = operator(address, name), token(address, name)
        _exit(command.run(terminal, *at, interval, once, as_json))

    @app.command()
    def bench(
        rate: Annotated[
            str,
            typer.Option(help="Requests/s, that come as they come; or several: 2,4,8."),
        ] = "",
        concurrency: Annotated[
            int | None,
            typer.Option(min=1, help="Requests under way at any time, instead. Unset: 4."),
        ] = None,
        trace: Annotated[Path | None, typer.Option(help=f"Replay, instead: {TRACE_HELP}")] = None,
        seconds: Annotated[
            float | None,
            typer.Option(min=0.1, help="Measured. Unset: 30, or until --requests or --trace end."),
        ] = None,
        requests: Annotated[int | None, typer.Option(min=1, help="Measured, at most.")] = None,
        warm_up: Annotated[
            float | None,
            typer.Option(min=0, help="Seconds before that. Unset: 3; of a trace none."),
        ] = None,
        prompt_tokens: Annotated[
            str, typer.Option(help="Of each prompt: 512, or 256-1024, drawn evenly.")
        ] = "",
        output_tokens: Annotated[str, typer.Option(help="Of each answer: 64, or 16-128.")] = "",
        shared_prefix: Annotated[
            int, typer.Option(min=0, help="Of the prompts' tokens, the first, alike in all.")
        ] = 0,
        slo: Annotated[
            str,
            typer.Option(help="Targets in seconds: ttft=0.5,tpot=0.05. Unset: each class's."),
        ] = "",
        own_targets: Annotated[
            bool,
            typer.Option("--own-targets", help="Requests ask for --slo, not for their class's."),
        ] = False,
        slo_class: Annotated[
            str, typer.Option("--class", help="interactive, standard or batch.")
        ] = "standard",
        burstiness: Annotated[
            float,
            typer.Option(
                min=0,
                help="Of --rate: variance of the gaps over their mean squared. 1: Poisson. "
                "vLLM's bench takes the inverse.",
            ),
        ] = 1.0,
        speed: Annotated[float, typer.Option(min=0.001, help="Of --trace, times its own.")] = 1.0,
        model: Annotated[str, typer.Option(help="Unset: the first.")] = "",
        timeout: Annotated[float, typer.Option(min=0.1, help="A request's deadline.")] = 60.0,
        seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and prompts.")] = 1,
        may_fail: Annotated[
            float,
            typer.Option(
                min=0,
                max=1,
                help="Share of a load's requests; if more are refused or fail: exit 1.",
            ),
        ] = 0.0,
        name: Name = None,
        address: Router = None,
        as_json: Json = False,
    ) -> None:
        """Load a cluster that runs, and say what it served. The tenant is that of PDSERVE_TOKEN.

        Exits 0 if every request was served, 1 if one was refused or failed (see --may-fail) or none
        came, 130 after Ctrl-C.
        """
        from cluster.cli import bench as command
        from cluster.cli.bench_load import parse_lengths, parse_rates

        wanted = command.Wanted(
            model=model,
            rates=parse_rates(rate) if rate else (),
            burstiness=burstiness,
            concurrency=concurrency,
            trace=trace,
            speed=speed,
            requests=requests,
            seconds=seconds,
            warm_up=warm_up,
            prompt=parse_lengths("prompt-tokens", prompt_tokens) if prompt_tokens else None,
            output=parse_lengths("output-tokens", output_tokens) if output_tokens else None,
            shared=shared_prefix,
            slo_class=slo_class,
            slo=slo,
            own_targets=own_targets,
            seed=seed,
            timeout=timeout,
            may_fail=may_fail,
        )
        given = tuple(filter(None, (address or "").split(",")))
        routers = tuple(where(each, name) for each in given)
        first = routers[0] if routers else None
        at, known = (operator(first, name), token(first, name)), where(first, name)
        _exit(command.run(terminal, routers, at, known, wanted, as_json))


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)
