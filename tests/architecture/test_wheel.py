"""What a stranger installs: one wheel with the contract, both sides, and compiled protos."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"fedloom", "coordinator", "crypto", "edge_agent", "simulation"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)], check=True
    )
    (wheel,) = out.glob("fedloom-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_has_the_packages_and_the_compiled_protos(names: set[str]) -> None:
    for proto in (ROOT / "protos" / "fedloom" / "v1").glob("*.proto"):
        stem = f"fedloom/v1/{proto.stem}"
        assert {f"{stem}.proto", f"{stem}_pb2.py", f"{stem}_pb2.pyi"} <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    migrations = (ROOT / "coordinator" / "migrations").rglob("*.py")
    assert {str(path.relative_to(ROOT)) for path in migrations} <= names
    assert "coordinator/migrations/versions/r0001_first.py" in names
    assert {"edge_agent/app.py", "coordinator/app.py", "crypto/bfv.py"} <= names


def test_the_wheel_has_nothing_else(names: set[str]) -> None:
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == PACKAGES
    assert not [name for name in names if "test" in name or name.endswith((".csv", ".onnx"))]
