"""The arguments of the commands that steer the pools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.cli.terminal import Terminal
from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.cli.steer import Steering

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str | None, typer.Option(help="Of the cluster, where several run.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="host:port of a router's Operator API: its gRPC, where that has no port of its own."
        " Unset: the cluster that runs here."
    ),
]
Model = Annotated[str, typer.Option(help="Unset: the only one.")]
Worker = Annotated[str, typer.Argument(help="Its id, as `pdserve status` shows it.")]
Role = Annotated[str, typer.Argument(help="prefill, decode or both.")]
Where = Callable[[str | None, str | None], str]


def add_steering(app: typer.Typer, terminal: Terminal, where: Where, token: Where) -> None:
    """Adds the commands to `app`.

    Args:
        where: the address of a router, from --address and --name.
        token: the operator's, likewise.
    """

    def to(address: str | None, name: str | None, as_json: bool) -> Steering:
        from cluster.cli.steer import Steering

        return Steering(terminal, where(address, name), token(address, name), as_json)

    @app.command()
    def recommend(name: Name = None, address: Address = None, as_json: Json = False) -> None:
        """What the planner would have: workers by role, as they are and as they should be."""
        _exit(to(address, name, as_json).recommend())

    @app.command()
    def explain(
        request: Annotated[
            str, typer.Argument(help="A request's id: why it was placed so. Unset: the planner.")
        ] = "",
        model: Model = "",
        tenant: Annotated[
            str, typer.Option(help="Whose request, where several have one of that id.")
        ] = "",
        limit: Annotated[int, typer.Option(min=1, max=500, help="Decisions.")] = 10,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Why the pools are as they are: the latest decisions, with their reasons."""
        steering = to(address, name, as_json)
        if request:
            _exit(steering.explain_request(request, tenant))
        _exit(steering.explain_plan(model, limit))

    @app.command()
    def scale(
        role: Role,
        workers: Annotated[int, typer.Argument(min=0, help="To have in this role.")],
        model: Model = "",
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Hold a pool at so many workers, until `pdserve release`."""
        from cluster.cli import plan_calls as calls

        steering = to(address, name, as_json)
        _exit(steering.order(lambda at: calls.scale(at, model, role, workers)))

    @app.command()
    def flip(
        worker: Worker,
        role: Role,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Have a worker take another role, its weights as they are; holds both pools."""
        from cluster.cli import plan_calls as calls

        _exit(to(address, name, as_json).order(lambda at: calls.flip(at, worker, role)))

    @app.command()
    def drain(
        worker: Worker, name: Name = None, address: Address = None, as_json: Json = False
    ) -> None:
        """Take a worker out: it ends what it has, and stays out until `pdserve release`."""
        from cluster.cli import plan_calls as calls

        _exit(to(address, name, as_json).order(lambda at: calls.drain(at, worker)))

    @app.command()
    def release(
        what: Annotated[
            str, typer.Argument(help="A drained worker's id, or a model whose pools are held.")
        ] = "",
        role: Annotated[str, typer.Option(help="Of the model's pools, only this one.")] = "",
        targets: Annotated[bool, typer.Option("--targets", help="Those set by hand.")] = False,
        everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Give back what was set by hand, to the planner or to the configuration."""
        from cluster.cli import plan_calls as calls

        if bool(what) + targets + everything != 1:
            raise InvalidRequest("release", "give a worker, a model, --targets or --all")
        steering = to(address, name, as_json)
        if everything:
            _exit(steering.order(calls.release_everything))
        if targets:
            _exit(steering.order(calls.release_targets))
        models = steering.models()
        if what in models or role:
            _exit(steering.order(lambda at: calls.release_pool(at, what, role)))
        _exit(steering.order(lambda at: calls.release_worker(at, what)))

    @app.command()
    def targets(
        slo_class: Annotated[str, typer.Argument(help="interactive, standard or batch.")],
        ttft: Annotated[float, typer.Option(min=0, help="Seconds; unset: as it is.")] = 0.0,
        tpot: Annotated[float, typer.Option(min=0, help="Seconds; unset: as it is.")] = 0.0,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Set a class's targets on the running cluster, until `pdserve release --targets`."""
        from cluster.cli import plan_calls as calls

        steering = to(address, name, as_json)
        _exit(steering.order(lambda at: calls.set_targets(at, slo_class, ttft, tpot)))

    @app.command()
    def record(
        out: Annotated[Path, typer.Argument(help="The request log, as `pdserve plan` reads it.")],
        seconds: Annotated[float, typer.Option(min=1, help="So long.")] = 60.0,
        served: Annotated[str, typer.Option(help="Only this model's. Unset: all.")] = "",
        name: Name = None,
        address: Address = None,
    ) -> None:
        """Write down what the cluster is asked: arrivals, lengths, prefix hashes, and no text."""
        from cluster.cli import record as command

        at = where(address, name), token(address, name)
        _exit(command.run(terminal, *at, out, seconds, served))

    @app.command()
    def profile(
        out: Annotated[Path, typer.Argument(help="For `planner.profile` and `plan --profile`.")],
        model: Annotated[str, typer.Option(help="A known model, or a directory of one.")],
        gpu: Annotated[str, typer.Option(help="A100, H100, H200, B200, L40S or CPU.")],
        tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per worker.")] = 1,
        served: Annotated[str, typer.Option(help="As the cluster calls it.")] = "",
        max_prompt: Annotated[int, typer.Option(min=256, help="Longest prompt measured.")] = 8192,
        max_batch: Annotated[int, typer.Option(min=4, help="Largest batch measured.")] = 64,
        shared: Annotated[
            bool, typer.Option("--shared", help="Workers share cores: measure what that costs.")
        ] = False,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Measure the idle cluster's workers for a minute, for the planner and the advisor."""
        from cluster.cli import profile as command

        what = model, gpu, tensor_parallel, served
        wanted = command.Wanted(*what, max_prompt, max_batch, out, shared)
        at = where(address, name), token(address, name)
        _exit(command.run(terminal, *at, wanted, as_json))


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)
