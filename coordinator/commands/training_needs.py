"""What training a plan takes, for `plan show`: the plan's estimate, and a step on request."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from coordinator.plans.measurement import StepFigures, measure_step, step_shape
from fedloom.plans import BaseStorage, Plan, TrainingMemory

MEGABYTE = 10**6


@dataclass(frozen=True)
class TrainingNeeds:
    """`shape` is rows and tokens of a full micro-batch."""

    storage: BaseStorage
    memory: TrainingMemory | None
    shape: tuple[int, int]
    measured: StepFigures | None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield lines of a table."""
        yield "base", self.storage.name.lower()
        if self.memory is not None:
            for rows, tokens in dict.fromkeys([(1, self.shape[1]), self.shape]):
                needed = self.memory.needed(rows, tokens) / MEGABYTE
                yield f"a step of {rows} x {tokens}", f"{needed:.0f} MB beside the base"
        if (step := self.measured) is not None:
            yield f"measured, {step.rows} x {step.tokens}", f"{1000 * step.seconds:.0f} ms a step"
            yield "peak of that process", f"{step.peak_bytes / MEGABYTE:.0f} MB"

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "base_storage": self.storage.name.lower(),
            "training_memory": None if self.memory is None else asdict(self.memory),
            "measured": None if self.measured is None else asdict(self.measured),
        }


def training_needs(folder: Path, plan: Plan, measure: bool) -> TrainingNeeds:
    """Read what the plan says, and run a step if asked to."""
    measured = measure_step(folder) if measure else None
    return TrainingNeeds(plan.base_storage, plan.training_memory, step_shape(plan.task), measured)
