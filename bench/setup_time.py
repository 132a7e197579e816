"""From a fresh clone to a served answer: how long `make setup` and the two `make demo` take."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.tables import table

ROOT = Path(__file__).resolve().parents[1]
DROPPED = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PDSERVE_EXAMPLES", "VIRTUAL_ENV")
"""A fresh user has none of them."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.setup_time",
        description=(
            "Clones the last commit of this repository into a temporary folder and times `make "
            "setup`, the first `make demo` (Python compiles what it imports) and the second. Takes "
            "minutes: setup downloads about 1 GB and unpacks 3 GB, which are removed at the end."
        ),
    )
    parser.add_argument("--no-cache", action="store_true", help="without pip's cache")
    parser.add_argument(
        "--folder", type=Path, help="where to put the clone (default: the system's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    return parser.parse_args(given)


def environment(base: dict[str, str], folder: Path, no_cache: bool) -> dict[str, str]:
    """A fresh user's environment, with a runtime directory of its own."""
    env = {name: value for name, value in base.items() if name not in DROPPED}
    env["PDSERVE_RUNTIME_DIR"] = str(folder / "run")
    if no_cache:
        env["PIP_NO_CACHE_DIR"] = "1"
    return env


def main() -> None:
    chosen = arguments()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-setup-", dir=chosen.folder) as folder:
        clone = Path(folder, "clone")
        env = environment(dict(os.environ), Path(folder), chosen.no_cache)
        steps = (
            ("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT),
            ("make setup", ["make", "setup"], clone),
            ("make setup again", ["make", "setup"], clone),
            ("first make demo", ["make", "demo"], clone),
            ("second make demo", ["make", "demo"], clone),
        )
        for name, command, where in steps:
            print(f"[{time.strftime('%H:%M:%S')}] {name}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            code = subprocess.run(command, cwd=where, env=env, stdout=sys.stderr).returncode
            seconds = time.perf_counter() - began
            rows.append({"step": name, "seconds": seconds, "exit_status": code})
            if code:
                break
    if chosen.json:
        print(json.dumps({"no_cache": chosen.no_cache, "rows": rows}, indent=2))
    else:
        cells = [[r["step"], f"{r['seconds']:.1f}", str(r["exit_status"])] for r in rows]
        print(table(["step", "seconds", "exit status"], cells))
    sys.exit(any(row["exit_status"] for row in rows))


if __name__ == "__main__":
    main()
