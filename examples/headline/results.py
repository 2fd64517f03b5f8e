"""What a training gave, kept in a file so that a run that is stopped goes on where it was."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """The outcome of one training of a case.

    `scores` are those after each round; of a training without rounds, its only one, which for
    local-only training is the mean over the agents.
    """

    settings: str  # digest of all that decides the outcome
    scores: tuple[float, ...]
    cpu_seconds: float
    seconds: float

    @property
    def score(self) -> float:
        """The last one: a run does not know which of its rounds was best on the test rows."""
        return self.scores[-1]


def settings_of(*facts: object) -> str:
    """Return a digest of facts that print what they are."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()[:16]


def read_result(path: Path, settings: str) -> Result | None:
    """Return what is kept, if it is of these settings."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    result = Result(**found | {"scores": tuple(found["scores"])})
    return result if result.settings == settings else None


def write_result(path: Path, result: Result) -> None:
    """Keep a result; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(asdict(result), indent=1) + "\n")
    partial.replace(path)
