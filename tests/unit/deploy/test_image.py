"""The Dockerfile, as far as a machine without an engine can tell."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement

from tests.unit.deploy.manifests import NAMES, ROOT, Overlay, missing_kubectl, render

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
KNOWN = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "ARG", "USER", "EXPOSE", "ENTRYPOINT", "CMD",
         "HEALTHCHECK"}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    name: str
    parent: str
    steps: tuple[tuple[str, str], ...]

    def last(self, instruction: str) -> str:
        return [rest for word, rest in self.steps if word == instruction][-1]


def stages() -> dict[str, Stage]:
    lines: list[str] = []
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if lines and lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1].rstrip() + " " + line.strip()
        else:
            lines.append(line.strip())
    found: dict[str, Stage] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        assert word in KNOWN, line
        if word == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert match, line
            found[match[2]] = Stage(match[2], match[1], ())
        else:
            last = list(found.values())[-1]
            found[last.name] = Stage(last.name, last.parent, (*last.steps, (word, rest.strip())))
    return found


def lineage(target: str) -> list[Stage]:
    """From the target down to its base."""
    chain = [stages()[target]]
    while chain[-1].parent in stages():
        chain.append(stages()[chain[-1].parent])
    return chain


def ignored(path: str) -> bool:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    plain = [p.removeprefix("**/") for p in patterns if p and not p.startswith("#")]
    return any(PurePosixPath(path).match(p) or path == p or path.startswith(f"{p}/") for p in plain)


def test_the_targets_of_the_guide_are_there() -> None:
    assert {"cpu", "gpu"} <= stages().keys()


def test_every_base_has_a_version_and_every_stage_its_parent() -> None:
    for stage in stages().values():
        if stage.parent not in stages():
            assert re.search(r":[\d.]+", stage.parent), f"{stage.parent} has no version"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    for stage in stages().values():
        for word, rest in stage.steps:
            if word != "COPY":
                continue
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            if origin := re.search(r"--from=(\S+)", rest):
                assert origin[1] in stages()
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source == "." or not ignored(source.rstrip("/")), source


def test_what_the_build_needs_is_not_ignored() -> None:
    packages = ("cluster", "router", "prefill_worker", "decode_worker")
    files = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
    for path in (*packages, *files, "proto/pdserve/v1/worker.proto"):
        assert (ROOT / path).exists() and not ignored(path), path
    for secret in ("ray_token", ".env", ".git"):
        assert ignored(secret)


@pytest.mark.parametrize(("target", "lock"), [("cpu", "cpu.txt"), ("gpu", "gpu.txt")])
def test_packages_come_from_the_lock_files_alone(target: str, lock: str) -> None:
    (origin,) = re.findall(r"--from=(\S+)", stages()[target].last("COPY"))
    runs = [rest for stage in lineage(origin) for word, rest in stage.steps if word == "RUN"]
    installs = [run for run in runs if "pip install" in run]
    assert any(f"-r requirements/{lock}" in run for run in installs)
    for run in installs:
        for command in run.split("pip install")[1:]:
            assert command.lstrip().startswith("--no-deps"), command
    assert (ROOT / "requirements" / lock).exists()


def test_pdserve_is_built_with_locked_tools() -> None:
    (run,) = [rest for word, rest in stages()["wheel"].steps if word == "RUN"]
    assert "pip wheel --no-deps --no-build-isolation" in run
    taken = re.search(r"grep -hE '(.+)' (requirements/.+?)\)", run)
    assert taken is not None
    lines = [line for file in taken[2].split() for line in (ROOT / file).read_text().splitlines()]
    found = {line.partition("==")[0] for line in lines if re.match(taken[1], line)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert (
        {Requirement(each).name for each in project}
        <= found
        == set(re.findall(r"[a-z-]{3,}", taken[1]))
    )
    for target in ("cpu", "gpu"):
        (origin,) = re.findall(r"--from=(\S+)", stages()[target].last("COPY"))
        assert "--from=wheel" in stages()[origin].last("COPY")


def test_the_cpu_image_takes_the_torch_of_the_lock() -> None:
    pins = (ROOT / "requirements" / "torch-cpu.txt").read_text()
    assert re.search(r"^torch==[0-9.]+$", pins, re.M)
    (run,) = [rest for word, rest in stages()["build-cpu"].steps if "torch-cpu.txt" in rest]
    assert "grep -o '^torch==[0-9.]*' requirements/torch-cpu.txt" in run


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_it_runs_as_a_user_under_an_init(target: str) -> None:
    steps = [step for stage in reversed(lineage(target)) for step in stage.steps]
    last = dict(steps)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert json.loads(last["ENTRYPOINT"])[0] == "tini"
    assert json.loads(last["CMD"])[0] == "pdserve"
    assert "/readyz" in last["HEALTHCHECK"]
    words = [word for word, _ in steps]
    assert "RUN" not in words[words.index("USER") :], "something runs after root is gone"


@pytest.mark.parametrize("name", NAMES)
def test_pods_are_the_image_s_user_and_find_its_model(name: str) -> None:
    if why := missing_kubectl():
        pytest.skip(why)
    overlay: Overlay = render(name)
    user = int(stages()["final"].last("USER").partition(":")[0])
    for pod in overlay.pods:
        if pod.ray:
            assert pod.spec["securityContext"]["runAsUser"] == user
    models = re.findall(r"/opt/pdserve/(examples/\S+)", overlay.cluster_yaml)
    copied = [rest for word, rest in stages()["final"].steps if word == "COPY"]
    assert all(any(f"{model} /opt/pdserve/{model}" in rest for rest in copied) for model in models)
