"""What the build, the lock files and the packages promise each other."""

import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = sorted((ROOT / "proto/pdserve/v1").glob("*.proto"))


def locked(*names: str) -> dict[str, str]:
    """Package name → version, over the named lock files."""
    lines = [
        line for name in names for line in (ROOT / "requirements" / name).read_text().splitlines()
    ]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_proto_is_never_a_package() -> None:
    # Ray brings proto-plus, whose import package is `proto`; ours would shadow it.
    assert not (ROOT / "proto/__init__.py").exists()
    assert (ROOT / "proto/pdserve/v1/__init__.py").exists()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.stem)
@pytest.mark.parametrize("suffix", ["_pb2", "_pb2_grpc"])
def test_generated_modules_import(schema: Path, suffix: str) -> None:
    importlib.import_module(f"pdserve.v1.{schema.stem}{suffix}")


@pytest.mark.parametrize(
    ("extra", "locks"),
    [
        (None, ["cpu.txt"]),
        (None, ["gpu.txt"]),
        ("cpu", ["cpu.txt", "torch-cpu.txt"]),
        ("gpu", ["gpu.txt"]),
        ("dev", ["cpu.txt", "dev.txt"]),
    ],
)
def test_locks_hold_every_direct_dependency(extra: str | None, locks: list[str]) -> None:
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pins = locked(*locks)
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"no {requirement.name} in {locks}: run make lock"
        assert requirement.specifier.contains(version), f"{requirement}, locked {version}"


def test_what_the_locks_hold_resolves() -> None:
    """By what the locked packages require of each other, as they are installed here. The GPU lock
    cannot be asked so on a machine that has not installed it."""
    excluded = (ROOT / "requirements" / "cpu.excludes").read_text().split()
    pins = locked("cpu.txt", "torch-cpu.txt", "dev.txt")
    asked = 0
    for name, version in pins.items():
        package = metadata.distribution(name)
        assert package.version.partition("+")[0] == version, f"{name}: run make setup"
        for requirement in map(Requirement, package.requires or ()):
            wanted = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if wanted in excluded and wanted not in pins:
                continue
            asked += 1
            assert wanted in pins, f"{name} needs {requirement}"
            there = metadata.version(wanted)  # torch's says which build it is
            assert requirement.specifier.contains(there, prereleases=True), (
                f"{name} needs {requirement}, locked {there}"
            )
    assert asked > len(pins)


def test_cpu_and_dev_locks_do_not_overlap() -> None:
    assert not locked("cpu.txt").keys() & locked("dev.txt").keys()


def test_cpu_lock_leaves_the_cuda_builds_out() -> None:
    cuda = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
    pins = locked("cpu.txt", "dev.txt").keys()
    assert not pins & cuda
    assert not [name for name in pins if name.startswith("nvidia-")]


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").iterdir()), ids=lambda p: p.name)
def test_requirements_name_no_index(path: Path) -> None:
    assert not re.search(r"://|--?(i|f|index-url|extra-index-url|find-links)\b", path.read_text())
