"""`pdserve scale`, `flip`, `drain`, `release`, `targets`, `recommend` and `explain`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import grpc.aio
from rich.table import Table

from cluster.cli import plan_calls as calls
from cluster.cli.access import channel
from cluster.cli.terminal import EXIT_FAILED, EXIT_OK, Terminal

T = TypeVar("T")
ROLES = ("prefill", "decode", "both")


class Steering:
    """The commands' bodies, against the router at `address`.

    Args:
        token: of the operator, where PDSERVE_TOKEN is not set.
    """

    def __init__(self, terminal: Terminal, address: str, token: str, as_json: bool) -> None:
        self._terminal = terminal
        self._address = address
        self._token = token
        self._as_json = as_json

    def order(self, call: Callable[[grpc.aio.Channel], Awaitable[str]]) -> int:
        """Gives an order and says what was done."""
        done = self._ask(call)
        if self._as_json:
            self._terminal.json({"done": done})
        else:
            self._terminal.out.print(done, markup=False)
        return EXIT_OK

    def recommend(self) -> int:
        """The plan as it is; exits 1 while there is none."""
        view = self._ask(calls.plan_view)
        if self._as_json:
            self._terminal.json(view)
        elif not view["at_seconds"]:
            self._terminal.out.print("the controller has written no plan yet", markup=False)
        else:
            self._print_plan(view)
        return EXIT_OK if view["at_seconds"] else EXIT_FAILED

    def explain_plan(self, model: str, limit: int) -> int:
        """The latest decisions, oldest first."""
        found = self._ask(lambda to: calls.decisions(to, model, limit))
        if self._as_json:
            self._terminal.json(found)
            return EXIT_OK
        for decision in reversed(found):
            self._print_decision(decision)
        if not found:
            self._terminal.out.print("nothing has been decided yet", markup=False)
        return EXIT_OK

    def explain_request(self, request_id: str, tenant: str = "") -> int:
        """Where each completion of a request was placed, against what else."""
        found = self._ask(lambda to: calls.placements(to, request_id, tenant))
        if self._as_json:
            self._terminal.json(found)
            return EXIT_OK
        for placed in found:
            self._print_placement(placed)
        return EXIT_OK

    def models(self) -> list[str]:
        """That the plan names."""
        return [str(plan["model"]) for plan in self._ask(calls.plan_view)["models"]]

    def _ask(self, call: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        async def ask() -> T:
            async with channel(self._address, self._token) as to:
                return await call(to)

        return asyncio.run(ask())

    def _print_plan(self, view: calls.Values) -> None:
        age = time.time() - view["at_seconds"]
        out = self._terminal.out
        out.print(f"planner: {view['mode']}, {age:.0f} s ago", markup=False)
        for plan in view["models"]:
            table = Table(title=plan["model"], title_justify="left", box=None)
            table.add_column("role")
            for column in ("serving", "wanted", "by hand", "needed", "target"):
                table.add_column(column, justify="right")
            decision = plan.get("decision") or {}
            for role in ROLES:
                numbers = [plan["serving"], plan["wanted"], plan["manual"]]
                numbers += [decision.get("needed", {}), decision.get("target", {})]
                if any(role in each for each in numbers):
                    table.add_row(role, *(str(each.get(role, "")) for each in numbers))
            out.print(table)
            if plan["drained_workers"]:
                out.print(f"drained: {', '.join(plan['drained_workers'])}", markup=False)
            for name, share in sorted(plan["attainment"].items()):
                out.print(f"{name}: {share:.1%} within their targets", markup=False)
            errors = plan["prediction_errors"]
            spoken = ", ".join(f"{step} ±{error:.0%}" for step, error in sorted(errors.items()))
            if plan["performance"]:
                out.print(f"{plan['performance']}{f' ({spoken})' if spoken else ''}", markup=False)
            if decision:
                self._print_decision(decision)

    def _print_decision(self, decision: calls.Values) -> None:
        out = self._terminal.out
        at = datetime.fromtimestamp(decision["at_seconds"]).strftime("%H:%M:%S")
        to = f"{_spoken(decision['have'])} → {_spoken(decision['target'])}"
        would = "" if decision["acted"] else " (recommended)"
        out.print(f"[bold]{at}[/] {decision['model']}: ", end="")
        out.print(f"{to}{would}, by the {decision['source']}", markup=False)
        for action in decision["actions"]:
            out.print(f"  {_action(action)}", markup=False)
        for reason in decision["reasons"] or [f"held: {decision['held']}"]:
            out.print(f"  {reason}", markup=False)

    def _print_placement(self, placed: calls.Values) -> None:
        out = self._terminal.out
        out.print(
            f"completion {placed['completion_index']}, attempt {placed['attempt']}, "
            f"{placed['prompt_tokens']} prompt tokens",
            markup=False,
        )
        for mark, way in (("→", placed["chosen"]), *((" ", w) for w in placed["losers"])):
            where = way["whole_worker"] or " + ".join(
                filter(None, (way["prefill_worker"], way["decode_worker"]))
            )
            out.print(
                f"  {mark} {where}: TTFT {way['ttft_seconds'] * 1e3:.1f} ms, "
                f"TPOT {way['tpot_seconds'] * 1e3:.2f} ms, cost {way['cost']:.3f}",
                markup=False,
            )
        if "observed_ttft_seconds" in placed:
            tpot = placed.get("observed_tpot_seconds", 0.0)
            out.print(
                f"    observed: TTFT {placed['observed_ttft_seconds'] * 1e3:.1f} ms, "
                f"TPOT {tpot * 1e3:.2f} ms",
                markup=False,
            )


def _spoken(numbers: dict[str, Any]) -> str:
    parts = [f"{numbers[role]} {role}" for role in ROLES if numbers.get(role)]
    return " + ".join(parts) or "none"


def _action(action: calls.Values) -> str:
    match action["kind"]:
        case "flip":
            return f"flip {action['worker_id']} to {action['role']}"
        case "add":
            on = f" on {action['node_type']}" if action["node_type"] else ""
            return f"add {action['worker_id']} ({action['role']}){on}"
    return f"remove {action['worker_id']}: {action['reason']}"
