"""What the coordinator proposes, validated: nothing past this file trusts its messages."""

from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.gates import OPEN_GATE, ActivationGate
from fedloom.plans import MAX_PLAN_BYTES
from fedloom.privacy import PrivacyTerms
from fedloom.quality import DEFAULT_EVALUATION, EvaluationTerms
from fedloom.terms import (
    ASYNCHRONOUS,
    MAX_CAPACITY,
    MAX_WEIGHT_CLASS,
    Encoding,
    LocalTraining,
    Protection,
    Release,
)
from fedloom.v1 import control_pb2

RUN_ID_BYTES = 16
MAX_ATTEMPT = (1 << 16) - 1  # u16 in everything that is bound to it
MAX_UNFINISHED_RUNS = 16  # what a hello names at most
_KEPT = "invitation.binpb"
_AGREED = "terms.binpb"


@dataclass(frozen=True)
class Terms:
    """An invitation, validated."""

    run_id: bytes
    round: int
    plan: ArtifactReference
    training: LocalTraining
    encoding: Encoding
    release: Release
    minimum: int  # fewest updates in a sum of the run
    previous_round: int = 0  # whose state is trained from; 0: the plan's
    attempt: int = 1  # that the round's next cohort will have
    rounds: int = 1  # that the run shall finish
    gate: ActivationGate = OPEN_GATE
    evaluation: EvaluationTerms = DEFAULT_EVALUATION

    @property
    def privacy(self) -> PrivacyTerms:
        """What each party's knowledge follows from; who has the authority's key is not told."""
        return PrivacyTerms(
            self.encoding.protection,
            self.release,
            self.minimum,
            evaluation=self.evaluation,
            groups=self.training.groups,
            sends_labels=self.training.sends_labels,
            weighting=self.training.weighting,
            is_asynchronous=self.training.is_asynchronous,
        )


@dataclass(frozen=True)
class Outcome:
    """A finished round, validated: its sum and what the sum is bound to."""

    round: int
    attempt: int
    weight_cap: int
    slots: tuple[int, ...]
    sum: ArtifactReference
    cohort_digest: bytes = b""  # under masks: 32 bytes
    previous_round: int = 0  # 0: the first of the run
    key_id: int = 0  # 0: without a run key


@dataclass(frozen=True)
class Cohort:
    """Who takes part in an attempt, validated."""

    round: int
    attempt: int
    members: tuple[str, ...]
    weight_cap: int
    clip: float


def read_run_id(run_id: bytes) -> bytes:
    """Validate a run's id; raises Refused(MALFORMED)."""
    _require(len(run_id) == RUN_ID_BYTES, f"a run id of {RUN_ID_BYTES} bytes")
    return run_id


def read_terms(message: control_pb2.Invitation) -> Terms:
    """Validate an invitation; raises Refused(MALFORMED)."""
    _require_after(message.round, message.previous_round)
    _require(message.attempt <= MAX_ATTEMPT, f"an attempt of at most {MAX_ATTEMPT}")
    _require(1 <= message.minimum <= MAX_CAPACITY, f"a minimum of 1..{MAX_CAPACITY} updates")
    _require(message.rounds >= 1, "at least one round")
    plan = ArtifactReference(message.plan.sha256, message.plan.size_bytes)
    _require(plan.size_bytes <= MAX_PLAN_BYTES, f"a plan of at most {MAX_PLAN_BYTES} bytes")
    training = LocalTraining.from_message(message.training)
    encoding = Encoding.from_message(message.encoding)
    kind, plain = training.compression, encoding.protection is Protection.PLAIN
    _require(plain or not kind.needs_plain, f"protection PLAIN with compression {kind.name}")
    return Terms(
        read_run_id(message.run_id),
        message.round,
        plan,
        training,
        encoding,
        Release.from_message(message.release),
        message.minimum,
        message.previous_round,
        message.attempt,
        message.rounds,
        ActivationGate.from_message(message.gate),
        EvaluationTerms.from_message(message.evaluation),
    )


def is_asynchronous(message: control_pb2.Invitation) -> bool:
    """Tell whether the run goes on while this device trains."""
    return int(message.training.strategy) in ASYNCHRONOUS


def read_outcome(message: control_pb2.RoundOutcome) -> Outcome:
    """Validate a finished round; raises Refused(MALFORMED)."""
    slots = tuple(message.slots)
    _require_after(message.round, message.previous_round)
    _require(message.attempt <= MAX_ATTEMPT, f"an attempt of at most {MAX_ATTEMPT}")
    _require(1 <= len(slots) <= MAX_CAPACITY, f"1..{MAX_CAPACITY} updates in a sum")
    _require(slots == tuple(sorted(set(slots))), "distinct slots in ascending order")
    _require_weight_cap(message.weight_cap)
    return Outcome(
        message.round,
        message.attempt,
        message.weight_cap,
        slots,
        ArtifactReference(message.sum.sha256, message.sum.size_bytes),
        message.cohort_digest,
        message.previous_round,
        message.key_id,
    )


def read_cohort(message: control_pb2.Cohort) -> Cohort:
    """Validate a cohort, but for what masks need; raises Refused(MALFORMED)."""
    _require(1 <= message.attempt <= MAX_ATTEMPT, f"an attempt of 1..{MAX_ATTEMPT}")
    _require_weight_cap(message.weight_cap)
    members = tuple(message.members)
    return Cohort(message.round, message.attempt, members, message.weight_cap, message.clip)


def keep_invitation(folder: Path, message: control_pb2.Invitation) -> None:
    """Remember the invitation: a process that is started again goes on from it."""
    _write(folder / _KEPT, message)


def _write(path: Path, message: control_pb2.Invitation) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(message.SerializeToString())
    partial.replace(path)


def kept_invitation(folder: Path) -> control_pb2.Invitation | None:
    """Return the run's last invitation; None when there was none."""
    return _read(folder / _KEPT)


def _read(path: Path) -> control_pb2.Invitation | None:
    try:
        return control_pb2.Invitation.FromString(path.read_bytes())
    except (OSError, DecodeError):
        return None


def forget_invitation(folder: Path) -> None:
    """The run is over for this device: nothing goes on from there any more.

    What was agreed stays, without keys and without anyone's name: models are described by it.
    """
    if (message := kept_invitation(folder)) is not None:
        terms = control_pb2.Invitation(
            run_id=message.run_id,
            round=message.round,
            plan=message.plan,
            training=message.training,
            encoding=message.encoding,
            release=message.release,
            minimum=message.minimum,
            rounds=message.rounds,
            gate=message.gate,
            evaluation=message.evaluation,
        )
        _write(folder / _AGREED, terms)
    (folder / _KEPT).unlink(missing_ok=True)


def agreed_terms(folder: Path) -> Terms | None:
    """Return what was agreed in a run, also in one that is over; None when it cannot be read."""
    message = kept_invitation(folder) or _read(folder / _AGREED)
    try:
        return None if message is None else read_terms(message)
    except Refused:  # kept by another version
        return None


def unfinished_runs(runs: Path) -> list[bytes]:
    """Return the ids of runs that this device was invited to and has not heard the end of."""
    kept = sorted(runs.glob(f"*/{_KEPT}"), key=lambda path: path.stat().st_mtime)
    return [bytes.fromhex(path.parent.name) for path in kept[-MAX_UNFINISHED_RUNS:]]


def _require_after(round_number: int, previous: int) -> None:
    _require(round_number > previous, f"a round after {previous}, found {round_number}")


def _require_weight_cap(weight_cap: int) -> None:
    _require(1 <= weight_cap <= 1 << MAX_WEIGHT_CLASS, f"a weight cap of 1..2^{MAX_WEIGHT_CLASS}")


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {expected}")
