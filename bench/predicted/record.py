"""What a run leaves, written after every load: the numbers, the table, and every request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.predicted.clients import Seen
from bench.predicted.rows import Row, Split, row_of, table
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import hardware
from cluster.planner.performance import Performance
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import ModelShape
from cluster.simulator.engine import EngineLimits
from router.placement import Mode


@dataclass(frozen=True)
class Ran:
    """What the predictions rest on besides the profile.

    Attributes:
        kv_capacity: tokens that a worker's cache holds; 0: what the hardware's memory leaves.
        workloads: means of prompt and output tokens.
    """

    shape: ModelShape
    gpu: str
    kv_capacity: int
    limits: EngineLimits
    mode: Mode
    workloads: dict[str, tuple[int, int]]

    def split(self, profile: Profile) -> Split:
        """Raises InvalidRequest if the profile is of something else."""
        profile.check(self.shape.name, self.gpu, 1)
        worker = calibrate(roofline(self.shape, hardware(self.gpu)), profile).performance
        return Split(self._with_cache(worker), self.limits, self.mode)

    def _with_cache(self, worker: Performance) -> Performance:
        return replace(worker, kv_capacity=self.kv_capacity) if self.kv_capacity else worker


@dataclass(frozen=True)
class Load:
    """One workload at one rate, as it was sent."""

    workload: str
    rate: float
    seen: tuple[Seen, ...]
    again: tuple[Seen, ...] = ()


class Record:
    """A run's folder."""

    def __init__(self, folder: Path, about: dict[str, str], ran: Ran) -> None:
        self._folder = folder
        self.about = about
        self.ran = ran
        self.loads: list[Load] = []

    @property
    def profile_path(self) -> Path:
        return self._folder / "profile.json"

    def split(self) -> Split:
        return self.ran.split(Profile.from_json(self.profile_path.read_text()))

    def rows(self) -> list[Row]:
        """Predicted anew, by the code that is here."""
        split, rows = self.split(), []
        for load in self.loads:
            row = row_of(
                split, load.workload, self.ran.workloads[load.workload], load.rate, load.seen
            )
            rows.append(row.sent_again(load.again) if load.again else row)
        return rows

    def save(self) -> None:
        rows = self.rows()
        facts = {"about": self.about, "ran": asdict(self.ran)}
        whole = {**facts, "rows": [asdict(row) for row in rows]}
        (self._folder / "results.json").write_text(json.dumps(whole, indent=1))
        about = "".join(f"- {key}: {value}\n" for key, value in self.about.items())
        (self._folder / "table.md").write_text(f"{about}\n{table(rows)}\n")
        with (self._folder / "requests.jsonl").open("w") as lines:
            for load in self.loads:
                for run, sent in enumerate((load.seen, load.again)):
                    for seen in sent:
                        key = {"workload": load.workload, "rate": load.rate, "run": run}
                        lines.write(json.dumps({**key, **asdict(seen)}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """A former run's."""
        whole = json.loads((folder / "results.json").read_text())
        ran = whole["ran"]
        record = cls(
            folder,
            whole["about"],
            Ran(
                ModelShape(**ran["shape"]),
                ran["gpu"],
                ran["kv_capacity"],
                EngineLimits(**ran["limits"]),
                ran["mode"],
                {name: tuple(means) for name, means in ran["workloads"].items()},
            ),
        )
        sent: dict[tuple[str, float], tuple[list[Seen], list[Seen]]] = {}
        for line in (folder / "requests.jsonl").read_text().splitlines():
            values: dict[str, Any] = json.loads(line)
            key = values.pop("workload"), values.pop("rate")
            run = values.pop("run")
            values |= {"phases": tuple(values["phases"]), "came": tuple(values["came"])}
            sent.setdefault(key, ([], []))[run].append(Seen(**values))
        record.loads = [Load(*key, tuple(a), tuple(b)) for key, (a, b) in sent.items()]
        return record


def order(workloads: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float, int]]:
    """Every load once, then the middle rates again: workload, share, run."""
    once = [(name, share, 0) for name in workloads for share in shares]
    return [*once, *((name, shares[len(shares) // 2], 1) for name in workloads)]
