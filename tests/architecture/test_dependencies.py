"""What the code imports is what an installation of it brings: a stranger has no more than that."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests.architecture.test_imports import MODULES, PACKAGES, ROOT, _imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions(requirements: list[str]) -> set[str]:
    """Return the names that are required, with those of our own extras."""
    found: set[str] = set()
    for requirement in requirements:
        if extras := re.match(r"fedloom\[(.*)\]", requirement):
            for extra in extras[1].split(","):
                found |= distributions(PROJECT["optional-dependencies"][extra])
        else:
            found.add(re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-"))
    return found


def third_parties(prefix: str, without: str = " ") -> dict[str, set[str]]:
    """Return what each module below `prefix` imports and neither we nor Python bring."""
    ours = {*PACKAGES, "google", "compression"} | set(sys.stdlib_module_names)  # Python 3.14's
    return {
        name: {found.partition(".")[0] for found in _imports(path)} - ours
        for name, path in MODULES.items()
        if name.startswith(prefix) and not name.startswith(without)
    }


@pytest.mark.parametrize(
    ("prefix", "without", "extras"),
    [
        ("fedloom", "fedloom.merging", []),
        ("fedloom.merging", " ", ["export"]),
        ("crypto", " ", ["he"]),
        ("edge_agent", "edge_agent.torch_", ["agent", "parquet", "scrub"]),
        ("edge_agent.torch_", " ", ["torch"]),
        ("coordinator", "coordinator.plans", ["coordinator", "s3"]),
        ("coordinator.plans", " ", ["coordinator", "plan"]),
        ("simulation", " ", ["sim"]),
    ],
)
def test_what_is_imported_is_required(prefix: str, without: str, extras: list[str]) -> None:
    required = distributions(PROJECT["dependencies"])
    for extra in extras:
        required |= distributions(PROJECT["optional-dependencies"][extra])
    providers = packages_distributions()
    for module, imports in third_parties(prefix, without).items():
        for name in imports:
            found = {provider.lower().replace("_", "-") for provider in providers.get(name, [])}
            assert found & required, f"{module} imports {name}, which nothing requires"
