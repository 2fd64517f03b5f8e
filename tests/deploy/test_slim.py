"""The slim install: its list is what an agent requires, and its script deletes what it says."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.slim.slim import UNUSED, size, unused
from tests.architecture.test_dependencies import PROJECT, distributions

ROOT = Path(__file__).parents[2]
LISTED = [
    Requirement(line)
    for line in (ROOT / "deploy" / "slim" / "requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]


def closure(names: set[str], never: str) -> set[str]:
    """Return the names with all that they require here, in turn, but never one of them."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found or name == never:
            continue
        found.add(name)
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.add(canonicalize_name(requirement.name))
    return {str(canonicalize_name(name)) for name in found}


def test_the_list_is_what_an_agent_requires_but_the_hub() -> None:
    agent = distributions(PROJECT["dependencies"]) | distributions(["fedloom[agent]"])
    listed = {str(canonicalize_name(requirement.name)) for requirement in LISTED}
    assert listed == closure(agent, never="huggingface-hub")


def test_the_list_has_the_versions_that_are_tested() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in pinned) if v}
    for requirement in LISTED:
        assert str(requirement.specifier) == f"=={tested[canonicalize_name(requirement.name)]}"


def test_nothing_inside_a_folder_that_goes_is_counted_twice(tmp_path: Path) -> None:
    for name in ("a/tests/tests/x.py", "a/tests/b/__pycache__/x.pyc", "a/__pycache__/y.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100))
    assert unused(tmp_path, "**/tests") == [tmp_path / "a" / "tests"]
    assert [size(path) for path in unused(tmp_path, "**/tests")] == [200]
    assert len(unused(tmp_path, "**/__pycache__")) == 2


def test_no_pattern_reaches_a_module_that_an_agent_imports() -> None:
    sources = [
        p for name in ("crypto", "edge_agent", "protos") for p in (ROOT / name).rglob("*.py")
    ]
    imported = {
        name.replace(".", "/")
        for source in sources
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", source.read_text(), re.M)
    }
    for pattern in UNUSED:
        assert not any(name == pattern or name.startswith(f"{pattern}/") for name in imported)
