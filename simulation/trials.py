"""A trial of a search, and the run that it conducts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from fedloom.errors import FedloomError
from simulation.space import Value


class Unfit(FedloomError):
    """A trial's run cannot be conducted: its file is refused, or its training fails."""


class Candidate(Protocol):
    """A trial's run between two rounds."""

    @property
    def values(self) -> Sequence[float]:
        """The metric after each round so far."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no round is left."""
        ...

    def advance(self) -> None:
        """Conduct a round; raises Unfit or Refused."""
        ...

    def close(self, kept: bool) -> None:
        """Let go of it; what it has on disk is `kept` where the trial is to go on later."""
        ...


Begin = Callable[[int, Mapping[str, Value]], Candidate]  # of a trial's number; raises Unfit


class State(Enum):
    """How a trial stands."""

    FINISHED = "finished"
    STOPPED = "stopped"  # its values were poor
    REFUSED = "refused"  # it cannot be
    OPEN = "open"


@dataclass(frozen=True)
class Trial:
    """One run file that was tried."""

    number: int  # from 1
    state: State
    parameters: Mapping[str, Value]
    values: tuple[float, ...]  # the metric after each round
    seconds: float
    reason: str = ""  # why it was stopped or refused
