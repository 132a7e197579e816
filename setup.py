"""Generates the protobuf modules into proto/pdserve/v1 before they are packaged."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def generate() -> None:
    """Run protoc on every schema file; raise when it fails."""
    from grpc_tools import protoc

    files = sorted((ROOT / "proto/pdserve/v1").glob("*.proto"))
    out = ROOT / "proto"
    wellknown = Path(protoc.__file__).parent / "_proto"
    kinds = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    args = ["protoc", f"-I{out}", f"-I{wellknown}", *kinds, *map(str, files)]
    if not files or protoc.main(args):
        sys.exit("protoc failed on proto/pdserve/v1")


class BuildPy(build_py):
    """build_py that generates first; editable installs and wheels both pass here."""

    def run(self) -> None:
        generate()
        super().run()


setup(cmdclass={"build_py": BuildPy})
