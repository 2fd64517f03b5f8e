"""Compile the protos into the `fedloom` package when the project is installed or built."""

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):
    """Generate `fedloom/v1/*_pb2*.py[i]` beside their sources: build artefacts, never committed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        from grpc_tools import protoc

        root = Path(self.root) / "protos"
        sources = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.proto"))
        well_known = Path(protoc.__file__).parent / "_proto"
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={root}",
                f"--proto_path={well_known}",
                f"--plugin=protoc-gen-mypy={_program('protoc-gen-mypy')}",
                f"--plugin=protoc-gen-mypy_grpc={_program('protoc-gen-mypy_grpc')}",
                f"--python_out={root}",
                f"--grpc_python_out={root}",
                f"--mypy_out=quiet:{root}",
                f"--mypy_grpc_out=quiet:{root}",
                *sources,
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc failed with status {status} on {sources}")


def _program(name: str) -> str:
    """Find a build requirement's program: in an isolated build it is on PATH, not beside Python."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or str(beside)
