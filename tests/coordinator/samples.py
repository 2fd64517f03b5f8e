"""Small stand-ins for what the coordinator works on: a run driven by hand, and a plan folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.events import (
    AgentConnected,
    Applied,
    Effect,
    Event,
    Ready,
    SumStored,
    Tick,
    Uploaded,
)
from coordinator.rounds import handle
from coordinator.run_state import Phase, RunPolicy, RunState
from fedloom.adapters import Theta
from fedloom.plans import Plan, TrainableTensor

SHA, OTHER_SHA = bytes(32), bytes([1]) * 32
POLICY = RunPolicy(
    rounds=2,
    minimum_agents=2,
    cohort_size=3,
    needs_key=False,
    gathering_seconds=100,
    training_seconds=200,
    upload_seconds=300,
    applying_seconds=400,
)
LAYOUT = (TrainableTensor("head.weight", (2, 3), 0), TrainableTensor("head.bias", (2,), 6))
RUN_FILE = """
name = "intent"
plan = "plan"
rounds = 3
[cohort]
minimum = 2
size = 10
[protection]
kind = "encrypted"
"""


@dataclass(frozen=True)
class PlanFolder:
    """A folder that holds a plan and its members, and the initial theta (P,)."""

    folder: Path
    plan: Plan
    theta: Theta


class Run:
    """Drives a run by hand, with a clock that stands still unless told."""

    def __init__(self, needs_key: bool = False, rounds: int = 2) -> None:
        policy = replace(POLICY, needs_key=needs_key, rounds=rounds)
        self.state = RunState(policy, deadline=policy.gathering_seconds)
        self.now = 0.0

    def on(self, *events: Event) -> tuple[Effect, ...]:
        """Handle the events and return the effects of the last one."""
        effects: tuple[Effect, ...] = ()
        for event in events:
            self.state, effects = handle(self.state, event, self.now)
        return effects

    def wait(self, seconds: float) -> tuple[Effect, ...]:
        """Let time pass, with one tick at its end."""
        self.now += seconds
        return self.on(Tick())

    def to(self, phase: Phase) -> "Run":
        """Go the straight way from the start to a phase, with the agents a and b."""
        way: dict[Phase, tuple[Event, ...]] = {
            Phase.GATHERING: (),
            Phase.TRAINING: (AgentConnected("a"), AgentConnected("b")),
            Phase.COLLECTING: (Ready("a", 1, 3), Ready("b", 1, 5)),
            Phase.SUMMING: (Uploaded("a", SHA), Uploaded("b", SHA)),
            Phase.APPLYING: (SumStored(),),
            Phase.RETURNING: (Applied("a", 1, SHA), Applied("b", 1, SHA)),
            Phase.COMPLETED: (),
        }
        if phase is Phase.FAILED:
            self.wait(self.state.policy.gathering_seconds)
            return self
        for stop, events in way.items():
            self.on(*events)
            if stop is phase:
                break
        return self


def three_in_training() -> Run:
    """A run whose agents a, b and c are invited: two of them were here before it opened."""
    run = Run()
    run.state = replace(run.state, connected=frozenset("bc"))
    run.on(AgentConnected("a"))
    return run
