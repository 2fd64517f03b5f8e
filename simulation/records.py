"""What a simulation leaves in its folder, so that a process that dies goes on where it was.

    simulation.json        what the run follows from; another run is refused
    journal.jsonl          a line for each round that was trained, and one for its quality
    after-round-N          the server's state (`fedloom.adapters`), replaced by a rename: the commit
    memories/              what clients remember, where the strategy asks for it

A line is written before the state that it tells of. What a later process finds of rounds beyond the
state is dropped: they are conducted again and come out the same.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_agent.engine import Evaluation
from edge_agent.global_state import LastRound
from fedloom.adapters import read_annotated_adapter, write_vectors
from fedloom.errors import ConfigError, Refused
from fedloom.plans import TrainableTensor
from fedloom.quality import Counts
from fedloom.strategies import RULES, ServerState
from fedloom.terms import LocalTraining
from simulation.conduct import Progress
from simulation.sums import RoundReport

_IDENTITY, _JOURNAL, _STATES = "simulation.json", "journal.jsonl", "after-round-*.safetensors"


class Records:
    """One run's folder; None keeps the journal in this process and nothing else."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self._folder = folder
        self.lines: list[dict[str, Any]] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _IDENTITY
        if path.exists() and json.loads(path.read_text()) != identity:
            raise ConfigError(
                str(folder),
                "expected a new folder or one of the same run, data and clients, found another's",
            )
        _replace(path, json.dumps(identity, sort_keys=True) + "\n")

    def restored(self, size: int, terms: LocalTraining) -> Progress | None:
        """Return where the run stood; None before its first round is finished."""
        if self._folder is None:
            return None
        layout = _layout(size, terms)
        found: Progress | None = None
        for path in sorted(self._folder.glob(_STATES)):
            progress = _read(path, layout, size)
            if progress is None:
                path.unlink()
            elif found is None or progress.last.round > found.last.round:
                found = progress
        self._cut_journal(0 if found is None else found.last.round)
        return found

    def _cut_journal(self, last: int) -> None:
        assert self._folder is not None  # noqa: S101 - asked above
        path = self._folder / _JOURNAL
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        self.lines = [line for line in map(json.loads, whole) if line["round"] <= last]
        _replace(path, "".join(f"{json.dumps(line)}\n" for line in self.lines))

    def trained(self, progress: Progress, report: RoundReport, terms: LocalTraining) -> None:
        """A round is finished: tell, then commit."""
        self._tell(asdict(report))
        if self._folder is None:
            return
        state, last = progress.server, progress.last
        path = self._folder / _STATES.replace("*", str(last.round))
        notes = {
            "rounds": str(state.rounds),
            "round": str(last.round),
            "attempt": str(last.attempt),
            "saturated": str(last.saturated),
            "next_clip": last.next_clip.hex(),  # to the bit
        }
        vectors = (state.theta, *state.vectors)
        write_vectors(path, _layout(len(state.theta), terms), vectors, notes)
        for older in self._folder.glob(_STATES):
            if older != path:
                older.unlink()

    def evaluated(self, round_number: int, evaluation: Evaluation) -> None:
        """The model of a finished round has been tried."""
        self._tell({"round": round_number, "evaluation": asdict(evaluation)})

    def evaluation(self, round_number: int) -> Evaluation | None:
        """Return what was told of a round's model."""
        for line in self.lines:
            if line["round"] == round_number and "evaluation" in line:
                return _evaluation(line["evaluation"])
        return None

    def reports(self) -> list[RoundReport]:
        """Return the finished rounds, in order."""
        return [RoundReport(**line) for line in self.lines if "evaluation" not in line]

    def _tell(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._folder is not None:
            with (self._folder / _JOURNAL).open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _evaluation(said: Mapping[str, Any]) -> Evaluation:
    counts = Counts(**{name: tuple(found) for name, found in said["counts"].items()})
    return Evaluation(**{**said, "counts": counts})


def _layout(size: int, terms: LocalTraining) -> tuple[TrainableTensor, ...]:
    names = ("theta", *(f"server: {name}" for name in RULES[terms.strategy].keeps))
    return tuple(TrainableTensor(n, (size,), size * i) for i, n in enumerate(names))


def _read(path: Path, layout: tuple[TrainableTensor, ...], size: int) -> Progress | None:
    try:
        values, notes = read_annotated_adapter(path, layout)
        theta, *vectors = values.reshape(-1, size)
        last = LastRound(
            int(notes["round"]),
            int(notes["attempt"]),
            int(notes["saturated"]),
            float.fromhex(notes["next_clip"]),
        )
        return Progress(ServerState(theta, int(notes["rounds"]), tuple(vectors)), last)
    except (Refused, KeyError, ValueError):
        return None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)
