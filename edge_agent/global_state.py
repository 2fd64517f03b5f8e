"""The run's global state on this device: theta after the rounds applied so far.

It is the plan's initial adapter and every round's sum, applied in order; each agent does so itself,
with the same float32 operations, and reports the digest. On disk the file's name says which round
it includes, so that one rename moves both.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from fedloom.adapters import Theta, read_adapter, write_adapter
from fedloom.plans import ADAPTER_FILE, Plan
from fedloom.strategies import Algorithm, ServerState

_FILE = re.compile(r"after-round-(\d{1,9})\.safetensors")


class GlobalState:
    """Theta and the number of rounds in it, kept in a folder."""

    def __init__(self, folder: Path, plan: Plan, plan_folder: Path, algorithm: Algorithm) -> None:
        self._folder = folder
        self._layout = plan.layout
        self._algorithm = algorithm
        folder.mkdir(parents=True, exist_ok=True)
        latest = max(self._saved(), default=None)
        if latest is None:
            initial = read_adapter(plan_folder / ADAPTER_FILE, plan.layout)
            self._state = algorithm.init(initial)
        else:
            theta = read_adapter(self._path(latest), plan.layout)
            self._state = ServerState(theta, latest)

    @property
    def theta(self) -> Theta:
        """(P,) float32; not to be written to."""
        return self._state.theta

    @property
    def rounds(self) -> int:
        """Number of rounds applied."""
        return self._state.rounds

    @property
    def sha256(self) -> bytes:
        """Digest of theta as f32 little-endian: equal on all agents."""
        return hashlib.sha256(np.ascontiguousarray(self.theta, "<f4").data).digest()

    def apply(self, mean_update: Theta) -> None:
        """Apply the next round's mean update and keep the result."""
        self._state = self._algorithm.apply(self._state, mean_update)
        write_adapter(self._path(self.rounds), self._layout, self.theta)
        for older in self._saved():
            if older < self.rounds:
                self._path(older).unlink()

    def reset(self, plan_folder: Path) -> None:
        """Go back to the plan's initial adapter: the rounds are applied anew from the history."""
        for saved in self._saved():
            self._path(saved).unlink()
        self._state = self._algorithm.init(read_adapter(plan_folder / ADAPTER_FILE, self._layout))

    def _saved(self) -> list[int]:
        names = (_FILE.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def _path(self, rounds: int) -> Path:
        return self._folder / f"after-round-{rounds}.safetensors"
