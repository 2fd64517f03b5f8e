"""A run that this device has taken up: where it lies here, what was agreed, how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from crypto import RunKey
from edge_agent.engine import Engine
from edge_agent.global_state import GlobalState
from edge_agent.held_updates import HeldUpdates
from edge_agent.invitations import Terms
from edge_agent.local_memory import LocalMemory
from edge_agent.masking import Masking
from edge_agent.protection import UpdateProtection
from edge_agent.run_keys import RunKeys
from edge_agent.status import StatusFile, Step
from edge_agent.transfer import Transfer
from fedloom.adapters import Theta
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.schedules import round_terms
from fedloom.strategies.parts import Parts
from fedloom.strategies.portions import own_model, parts_of, sends_everything
from fedloom.terms import LocalTraining
from fedloom.v1 import artifact_pb2, control_pb2

Send = Callable[[control_pb2.ConnectRequest], None]


class Interrupted(Exception):
    """The round went on without this device's update."""


@dataclass(frozen=True)
class Surroundings:
    """What a run needs of the device whatever its terms: its folder, and ways to speak."""

    run_id: bytes
    folder: Path
    agent_id: str
    transfer: Transfer
    send: Send
    status: StatusFile
    log: structlog.stdlib.BoundLogger

    async def upload(
        self,
        kind: artifact_pb2.UploadKind.ValueType,
        round_and_attempt: tuple[int, int],
        reference: ArtifactReference,
        path: Path,
    ) -> None:
        """Send a file that belongs to a round; raises Refused, or Interrupted when it is late."""
        header = artifact_pb2.UploadHeader(
            run_id=self.run_id,
            round=round_and_attempt[0],
            attempt=round_and_attempt[1],
            size_bytes=reference.size_bytes,
            sha256=reference.sha256,
            kind=kind,
        )
        try:
            await self.transfer.upload(header, path)
        except Refused as refused:
            if refused.reason is Reason.WRONG_ROUND:  # nothing that we must decline
                raise Interrupted from refused
            raise

    def report(self, step: Step, round_number: int, cause: str = "") -> None:
        """Tell a person what the device does now in this run."""
        self.status.step(step, self.run_id, round_number, cause)


@dataclass(frozen=True)
class Undertaking:
    """What the last invitation set, and the state that it led to."""

    terms: Terms
    plan: Plan
    engine: Engine
    protection: UpdateProtection
    state: GlobalState
    keys: RunKeys
    memory: LocalMemory
    masking: Masking | None  # None: no masks
    rank: int = 0  # that this device trains under HetLoRA; 0: the plan's
    held: HeldUpdates | None = None  # None: rounds are synchronous

    @property
    def round_terms(self) -> LocalTraining:
        """How to train in the round that follows the state."""
        return round_terms(self.terms.training, self.state.server.rounds, self.terms.rounds)

    @property
    def parts(self) -> Parts | None:
        """The parts of theta in the round that follows the state; None: all of it is sent."""
        if sends_everything(self.terms.training, self.plan.layout):
            return None
        return parts_of(self.terms.training, self.plan.layout, self.state.server.rounds)

    @property
    def own_model(self) -> Theta:
        """The model that this device uses: the state's, with what it keeps to itself."""
        kept = self.memory.vectors()
        return own_model(self.terms.training, self.plan.layout, self.state.theta, kept)

    @property
    def fine_tunes_next(self) -> bool:
        """Whether this device goes on alone from the state: its model is not done yet."""
        return self.terms.training.fine_tune_steps > 0 and (
            self.state.server.rounds >= self.terms.rounds
        )

    def key_to_encode(self) -> RunKey | None:
        """Return the key of the round in hand; None for a protection without keys."""
        return self.keys.to_encode() if self.terms.encoding.protection.has_run_key else None

    def key_to_open(self, key_id: int) -> RunKey | None:
        """Return the key of a finished round; None for a protection without keys."""
        return self.keys.to_open(key_id) if self.terms.encoding.protection.has_run_key else None

    def clip(self, weight_cap: int) -> float:
        """Return the range of values in the round that follows the state."""
        return self.protection.clip(weight_cap, self.state.last.next_clip)
