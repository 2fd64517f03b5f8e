"""The run's global state on this device: theta after the rounds applied so far.

It is the plan's initial adapter and every round's sum, applied in order; each agent does so itself,
with the same float32 operations, and reports the digest. What belongs to the state besides theta,
the next clip above all, stands in the same file, so that one rename moves everything.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from fedloom.adapters import Theta, read_adapter, read_annotated_adapter, write_adapter
from fedloom.errors import Refused
from fedloom.plans import ADAPTER_FILE, Plan
from fedloom.strategies import Algorithm, ServerState

_FILES = "after-round-*.safetensors"
_log = structlog.get_logger()


@dataclass(frozen=True)
class LastRound:
    """The round that was applied last, as far as it matters later; the default is none."""

    round: int = 0
    attempt: int = 0
    saturated: int = 0  # values that were clipped before encoding, over all members
    next_clip: float = 0.0  # range of values that its histogram implies; 0: none is derived
    opened_sha256: bytes = b""  # of the opened sum, where the coordinator may ask for it


class GlobalState:
    """Theta and the round that was applied last, kept in a folder."""

    def __init__(self, folder: Path, plan: Plan, plan_folder: Path, algorithm: Algorithm) -> None:
        self._folder = folder
        self._layout = plan.layout
        self._algorithm = algorithm
        self._initial = plan_folder / ADAPTER_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._last = self._restored() or self._beginning()

    @property
    def theta(self) -> Theta:
        """(P,) float32; not to be written to."""
        return self._state.theta

    @property
    def last(self) -> LastRound:
        """The round that was applied last."""
        return self._last

    @property
    def sha256(self) -> bytes:
        """Digest of theta as f32 little-endian: equal on all agents."""
        return hashlib.sha256(np.ascontiguousarray(self.theta, "<f4").data).digest()

    def apply(self, mean_update: Theta, applied: LastRound) -> None:
        """Apply the next round's mean update and keep the result."""
        state = self._algorithm.apply(self._state, mean_update)
        path = self._folder / _FILES.replace("*", str(applied.round))
        write_adapter(path, self._layout, state.theta, _notes(state.rounds, applied))
        self._state, self._last = state, applied
        for older in self._folder.glob(_FILES):
            if older != path:
                older.unlink()

    def reset(self) -> None:
        """Go back to the plan's initial adapter: the rounds are applied anew from the history."""
        for saved in self._folder.glob(_FILES):
            saved.unlink()
        self._state, self._last = self._beginning()

    def _beginning(self) -> tuple[ServerState, LastRound]:
        initial = read_adapter(self._initial, self._layout)
        return self._algorithm.init(initial), LastRound()

    def _restored(self) -> tuple[ServerState, LastRound] | None:
        """Return the newest state that is whole; what is not is no loss, the history gives it."""
        found = []
        for path in self._folder.glob(_FILES):
            try:
                theta, notes = read_annotated_adapter(path, self._layout)
                rounds, last = _noted(notes)
                found.append((ServerState(theta, rounds), last))
            except (Refused, ValueError, KeyError) as error:
                _log.warning("state discarded", file=path.name, problem=str(error))
                path.unlink()
        return max(found, key=lambda pair: pair[1].round, default=None)


def _notes(rounds: int, last: LastRound) -> dict[str, str]:
    return {
        "rounds": str(rounds),
        "round": str(last.round),
        "attempt": str(last.attempt),
        "saturated": str(last.saturated),
        "next_clip": last.next_clip.hex(),  # to the bit
        "opened_sha256": last.opened_sha256.hex(),
    }


def _noted(notes: dict[str, str]) -> tuple[int, LastRound]:
    last = LastRound(
        int(notes["round"]),
        int(notes["attempt"]),
        int(notes["saturated"]),
        float.fromhex(notes["next_clip"]),
        bytes.fromhex(notes["opened_sha256"]),
    )
    return int(notes["rounds"]), last
