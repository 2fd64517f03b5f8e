"""How much disk an agent takes: fresh environments, and their bytes by package."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLIM = ROOT / "deploy" / "slim"
# As pip does it; by devices.md's list; that, without bytecode, after its script.
WAYS = ("pip", "listed", "slim")
_INSTALLERS = frozenset(("pip", "setuptools", "wheel"))
OTHER = "(no package's)"


@dataclass(frozen=True)
class Installed:
    """Bytes by package; bytecode apart, for Python makes it as modules are loaded."""

    packages: dict[str, int]
    bytecode: int

    @property
    def without_bytecode(self) -> int:
        """Bytes of all packages."""
        return sum(self.packages.values())

    @property
    def total(self) -> int:
        """Bytes with bytecode."""
        return self.without_bytecode + self.bytecode


def install(folder: Path) -> dict[str, Installed]:
    """Install the wheel in each way, in an environment of its own; needs a package index."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("fedloom-*.whl")
    listed = ["--no-deps", "--requirement", str(SLIM / "requirements.txt"), str(wheel)]
    words = {
        "pip": ["--constraint", str(ROOT / "constraints.txt"), f"{wheel}[agent]"],
        "listed": listed,
        "slim": ["--no-compile", *listed],
    }
    found = {}
    for way in WAYS:
        environment = folder / way
        _run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
        python = str(environment / "bin" / "python")
        _run([*pip, "--python", python, "install", *words[way]])
        if way == "slim":
            _run([python, str(SLIM / "slim.py")])
        (site,) = environment.glob("lib/*/site-packages")
        found[way] = sizes(site)
    return found


def sizes(site: Path) -> Installed:
    """Count what lies in a site-packages, without installers."""
    owners = {
        site / file: owner.name
        for owner in distributions(path=[str(site)])
        for file in _files(owner)
    }
    packages: Counter[str] = Counter()
    bytecode = 0
    for path in site.rglob("*"):
        if not path.is_file():
            continue
        owner = owners.get(path, OTHER)
        if path.suffix == ".pyc" and owner not in _INSTALLERS:
            bytecode += path.stat().st_size
        elif owner not in _INSTALLERS:
            packages[owner] += path.stat().st_size
    return Installed(dict(packages.most_common()), bytecode)


def _files(distribution: Distribution) -> list[Path]:
    return [Path(str(file)) for file in distribution.files or ()]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
