"""The `pdserve` command: the composition root. Heavy modules are imported by the command that needs
them, so that `pdserve --help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.cli.batch_app import batch_app
from cluster.cli.config import config_commands
from cluster.cli.plan_app import add_planning
from cluster.cli.steer_app import add_steering
from cluster.cli.terminal import DEBUG, EXIT_INTERRUPTED, EXIT_OK, Terminal
from cluster.cli.watch_app import add_watching
from cluster.errors import InvalidRequest, PdserveError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=DEBUG,
    help="A disaggregated prefill/decode serving cluster for large language models.",
)
terminal = Terminal()
app.add_typer(config_commands(terminal), name="config")

File = Annotated[
    Path | None,
    typer.Option("-f", "--file", help="The cluster's YAML. Unset: the shipped demo cluster."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str | None, typer.Option(help="Of the cluster, where several run.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="host:port of a Ray cluster that this host is part of. Unset: ray.address; without it "
        "embedded."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="host:port of a router's gRPC. Unset: the cluster that runs here."),
]


@app.command()
def up(
    file: File = None,
    host: Annotated[str | None, typer.Option(help="Interface the routers listen on.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    operator_port: Annotated[
        int | None, typer.Option(help="Of the Operator API alone; 0 takes a free one.")
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Start a cluster and serve until Ctrl-C."""
    from cluster.cli import up as command
    from cluster.cli.settings import with_ray, with_router
    from cluster.config import Config

    def load(path: Path | None) -> Config:
        config = with_router(path, host, grpc_port, http_port, operator_port)
        return with_ray(config, ray_address)

    command.up(terminal, file, load)


@app.command()
def reload(file: File = None, name: Name = None) -> None:
    """Have the running cluster take over targets, limits, pool sizes and timeouts of a file."""
    from cluster.cli import reload as command

    _exit(command.reload(terminal, name, file))


@app.command()
def down(
    name: Name = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for it to be gone.")
    ] = 90.0,
) -> None:
    """End the cluster that runs here: drain, then stop."""
    from cluster.cli import up as command

    _exit(command.down(terminal, name, timeout))


@app.command()
def status(name: Name = None, address: Address = None, as_json: Json = False) -> None:
    """Workers and routers: role, state, KV blocks, pinned bytes, memory; what has no host yet."""
    from cluster.cli import status as command

    where = _operator_address(address, name)
    _exit(command.run(terminal, where, as_json, _operator_token(address, name)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    model: Annotated[str, typer.Option(help="Unset: the only one.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message; implies --chat.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Deadline, seconds.")] = 600.0,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Token by token.")] = True,
    timeline: Annotated[
        bool, typer.Option("-v", "--timeline", help="Show where the milliseconds went.")
    ] = False,
    name: Name = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Generate text over the cluster's gRPC API."""
    from cluster.cli import generate as command
    from cluster.cli.calls import Prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    turns = (("system", system),) if system is not None else ()
    as_chat = chat or system is not None
    asked = Prompt(
        text="" if as_chat else text,
        chat=(*turns, ("user", text)) if as_chat else (),
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        timeout_seconds=timeout,
    )
    where = _address(address, name)
    _exit(command.run(terminal, where, asked, stream, timeline, as_json))


@app.command()
def demo(file: File = None, as_json: Json = False) -> None:
    """Bring a cluster up, ask it questions with one right answer, show where time went, end it."""
    from cluster.cli import demo as command
    from cluster.cli.settings import for_demo

    command.demo(terminal, for_demo(file), as_json)


@app.command()
def doctor(file: File = None, as_json: Json = False) -> None:
    """What this machine can and cannot do, and how to mend it."""
    from cluster.cli import doctor as command
    from cluster.config import Config

    _exit(command.run(terminal, Config.load(file), as_json))


@app.command("drain-host")
def drain_host(
    file: File = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="That running requests get. Unset: lifecycle.drain_timeout_seconds."
        ),
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Drain what runs on this host of a Ray cluster and move it elsewhere: before the host goes."""
    from cluster.cli.settings import with_ray
    from cluster.config import Config
    from cluster.control.leaving import leave

    config = with_ray(Config.load(file), ray_address)
    drain = config.lifecycle.drain_timeout_seconds if seconds is None else seconds
    left = leave(config, drain)
    terminal.out.print(f"drained: {', '.join(left) or 'nothing was here'}", markup=False)


app.add_typer(batch_app(terminal, lambda address, name: _address(address, name)), name="batch")
add_watching(
    app,
    terminal,
    lambda address, name: _address(address, name),
    lambda address, name: _operator_address(address, name),
    lambda address, name: _operator_token(address, name),
)
add_planning(
    app,
    terminal,
    lambda address, name: _operator_address(address, name),
    lambda address, name: _operator_token(address, name),
)
add_steering(
    app,
    terminal,
    lambda address, name: _operator_address(address, name),
    lambda address, name: _operator_token(address, name),
)


def main() -> NoReturn:
    """The console script."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except PdserveError as error:
        code = terminal.fail(error)
    except Exception as error:
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _usage(error: Exception) -> int:
    """Errors of the command line itself exit with 2, everything else with 1."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", EXIT_INTERRUPTED))
    return terminal.fail(error)


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


def _address(address: str | None, name: str | None) -> str:
    if address is not None:
        if ":" not in address:
            raise InvalidRequest("--address", "must be host:port")
        return address
    from cluster.cli.rundir import find
    from cluster.errors import Unavailable

    state = find(name)
    if not state.grpc_address:
        raise Unavailable(f"the cluster {state.name!r} is {state.state}: it has no address yet")
    return state.grpc_address


def _operator_address(address: str | None, name: str | None) -> str:
    """Where a router serves the Operator API."""
    at = _address(address, name)
    if address is not None:
        return at
    from cluster.cli.rundir import find

    return find(name).operator_address or at


def _operator_token(address: str | None, name: str | None) -> str:
    """What opens the Operator API of a cluster that runs here."""
    if address is not None:
        return ""
    from cluster.cli.rundir import RunDir, find

    return RunDir(find(name).name).operator_token()
