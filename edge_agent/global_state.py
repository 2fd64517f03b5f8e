"""The run's global state on this device, after the rounds applied so far.

It is the plan's initial adapter and every round's sum, applied in order; each agent does so itself,
with the same float32 operations, and reports the digest. What belongs to the state besides theta,
the next clip and the vectors that the strategy's server keeps, stands in the same file, so that one
rename moves everything. A file of other vectors or notes than today's is discarded like a broken
one: the history gives the state again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog

from fedloom.adapters import Theta, read_adapter, read_annotated_adapter, write_vectors
from fedloom.errors import Refused
from fedloom.plans import ADAPTER_FILE, Plan, TrainableTensor
from fedloom.quality import Quality
from fedloom.strategies import RULES, ServerState, algorithm
from fedloom.terms import LocalTraining

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
    quality: Quality | None = None  # what its tail says, where updates have one


class GlobalState:
    """The server's state and the round that was applied last, kept in a folder."""

    def __init__(self, folder: Path, plan: Plan, plan_folder: Path, terms: LocalTraining) -> None:
        self._folder = folder
        self._plan = plan
        self._layout = _layout(plan, RULES[terms.strategy].keeps)
        self._algorithm = algorithm(terms, plan.layout)
        self._initial = plan_folder / ADAPTER_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._last = self._restored() or self._beginning()

    @property
    def theta(self) -> Theta:
        """(P,) float32; not to be written to."""
        return self._state.theta

    @property
    def server(self) -> ServerState:
        """All that the strategy's server has; not to be written to."""
        return self._state

    @property
    def last(self) -> LastRound:
        """The round that was applied last."""
        return self._last

    @property
    def sha256(self) -> bytes:
        """Digest of theta and the server's vectors, f32 little-endian: equal on all agents."""
        digest = hashlib.sha256()
        for vector in (self._state.theta, *self._state.vectors):
            digest.update(np.ascontiguousarray(vector, "<f4").data)
        return digest.digest()

    def apply(self, mean_update: Theta, count: int, applied: LastRound) -> None:
        """Apply the next round's mean update, of `count`, and keep the result."""
        state = self._algorithm.apply(self._state, mean_update, count)
        path = self._folder / _FILES.replace("*", str(applied.round))
        vectors = (state.theta, *state.vectors)
        write_vectors(path, self._layout, vectors, _notes(state.rounds, applied))
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
        initial = read_adapter(self._initial, self._plan.layout)
        return self._algorithm.init(initial), LastRound()

    def _restored(self) -> tuple[ServerState, LastRound] | None:
        """Return the newest state that is whole; what is not is no loss, the history gives it."""
        found = []
        for path in self._folder.glob(_FILES):
            try:
                values, notes = read_annotated_adapter(path, self._layout)
                rounds, last = _noted(notes)
                theta, *vectors = values.reshape(-1, self._plan.parameter_count)
                found.append((ServerState(theta, rounds, tuple(vectors)), last))
            except (Refused, ValueError, KeyError, TypeError) as error:
                _log.warning("state discarded", file=path.name, problem=str(error))
                path.unlink()
        return max(found, key=lambda pair: pair[1].round, default=None)


def _layout(plan: Plan, names: tuple[str, ...]) -> tuple[TrainableTensor, ...]:
    """Return the plan's layout, followed by the server's vectors."""
    size = plan.parameter_count
    vectors = (
        TrainableTensor(f"server: {name}", (size,), size * (index + 1))
        for index, name in enumerate(names)
    )
    return (*plan.layout, *vectors)


def _notes(rounds: int, last: LastRound) -> dict[str, str]:
    return {
        "rounds": str(rounds),
        "round": str(last.round),
        "attempt": str(last.attempt),
        "saturated": str(last.saturated),
        "next_clip": last.next_clip.hex(),  # to the bit
        "opened_sha256": last.opened_sha256.hex(),
        "quality": _told(last.quality),
    }


def _told(quality: Quality | None) -> str:
    """Floats as JSON writes them lose no bit."""
    return json.dumps(None if quality is None else asdict(quality))


def _read(text: str) -> Quality | None:
    values = json.loads(text)
    return None if values is None else Quality(**values)


def _noted(notes: dict[str, str]) -> tuple[int, LastRound]:
    last = LastRound(
        int(notes["round"]),
        int(notes["attempt"]),
        int(notes["saturated"]),
        float.fromhex(notes["next_clip"]),
        bytes.fromhex(notes["opened_sha256"]),
        _read(notes["quality"]),
    )
    if notes != _notes(int(notes["rounds"]), last):
        raise ValueError(f"expected the notes of a state, found {sorted(notes)}")
    return int(notes["rounds"]), last
