"""What may import what, beyond the layers that import-linter holds."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fedloom": ROOT / "protos" / "fedloom",
    "coordinator": ROOT / "coordinator",
    "crypto": ROOT / "crypto",
    "edge_agent": ROOT / "edge_agent",
    "simulation": ROOT / "simulation",
}
# gRPC stays at the edges: the rest speaks frozen values, refusals and files.
GRPC_EDGES = {
    "fedloom.errors",  # the codes and trailers of refusals
    "coordinator.admin_client",
    "coordinator.admin_listener",
    "coordinator.probe",
    "coordinator.server",
    "coordinator.services.access",
    "coordinator.services.admin",
    "coordinator.services.artifacts",
    "coordinator.services.control",
    "coordinator.services.enrolment",
    "coordinator.services.health",
    "coordinator.services.metering",
    "edge_agent.connection",
    "edge_agent.enrolment",
    "edge_agent.identity",
    "edge_agent.session",
    "edge_agent.transfer",
}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tenseal",
    "pyarrow",
    "ray",
}

STORE = {"crypto", "cryptography", "numpy", "sqlalchemy"}  # a command that only asks needs none


def _modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            if "_pb2" not in path.name:
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


MODULES = dict(_modules())


def test_the_walk_finds_every_package() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)
    assert len(MODULES) > 50


def test_grpc_stays_at_the_edges() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(found == "grpc" or found.startswith("grpc.") for found in _imports(path))
    }
    assert users == GRPC_EDGES


def test_crypto_is_mathematics() -> None:
    forbidden = {"asyncio", "grpc", "logging", "requests", "socket", "structlog", "subprocess"}
    for name, path in MODULES.items():
        if name.startswith("crypto"):
            roots = {found.partition(".")[0] for found in _imports(path)}
            assert not roots & (forbidden | {"fedloom", "coordinator", "edge_agent"}), name


def test_nothing_unpickles_and_only_the_bridge_loads_into_seal() -> None:
    for name, path in MODULES.items():
        source = path.read_text()
        roots = {found.partition(".")[0] for found in _imports(path)}
        assert not roots & {"pickle", "marshal", "shelve", "dill", "joblib"}, name
        assert "torch.load" not in source, name
        if "tenseal" in roots:
            assert name == "crypto.bfv"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("edge_agent.app", HEAVY | {"coordinator", "sqlalchemy", "typer"}),
        ("edge_agent.session", HEAVY | {"coordinator", "sqlalchemy", "typer"}),
        ("coordinator.app", HEAVY | STORE | {"edge_agent"}),
        ("simulation.command", HEAVY | STORE | {"edge_agent"}),
        ("simulation.plan_mover", {"torch", "transformers", "ray", "sqlalchemy"}),
        ("simulation.learning", {"torch", "transformers", "onnxruntime", "ray"}),
        ("coordinator.admin_client", HEAVY | STORE | {"edge_agent", "rich", "typer"}),
        ("coordinator.local_service", HEAVY | {"edge_agent", "crypto", "numpy", "typer"}),
        ("coordinator.server", HEAVY | {"edge_agent", "typer"}),
        ("crypto", HEAVY | {"fedloom", "coordinator", "edge_agent", "grpc"}),
    ],
)
def test_importing_stays_light(module: str, forbidden: set[str]) -> None:
    program = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    loaded = set(result.stdout.split())
    assert module.partition(".")[0] in loaded
    assert not loaded & forbidden
