"""Refusals: one enum of reasons, one table of what they mean and what an agent does about them.

    FedloomError
    ├── Refused        a step is refused, by us or by the peer: `reason`, `subject`
    └── ConfigError    a file or option that a person wrote is wrong: `where`, `problem`

On the wire a refusal is one `RefusalDetails` in `google.rpc.Status.details`, or a step of the
control stream.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, IntEnum

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from fedloom.v1 import refusal_pb2

MAX_SUBJECT_BYTES = 512
MAX_RETRY_SECONDS = 3600.0  # no peer silences another one for longer
_STATUS_KEY = "grpc-status-details-bin"  # where gRPC carries google.rpc.Status in every language


class Reason(IntEnum):
    """Why a step is refused; numbers and meanings are those of `fedloom/v1/refusal.proto`."""

    INVALID_TOKEN = 1
    TOKEN_EXPIRED = 2
    NOT_PERMITTED = 3
    PROTOCOL_UNSUPPORTED = 4
    MALFORMED = 5
    TOO_LARGE = 6
    DIGEST_MISMATCH = 7
    NOT_FOUND = 8
    WRONG_ROUND = 9
    NOT_IN_COHORT = 10
    NOT_FINITE = 11
    WEIGHT_OUT_OF_RANGE = 12
    PROTECTION_TOO_WEAK = 13
    PLAN_MISMATCH = 14
    PLAN_UNSUPPORTED = 15
    DATA_UNREADABLE = 16
    DATA_COLUMN_MISSING = 17
    DATA_LABEL_UNKNOWN = 18
    DATA_EMPTY = 19
    TRAINING_FAILED = 20
    KEY_UNAVAILABLE = 21
    SUM_NOT_VERIFIED = 22
    STATE_DIVERGED = 23
    QUORUM_NOT_REACHED = 24
    DEADLINE_PASSED = 25
    RUN_CANCELLED = 26
    SUPERSEDED = 27
    INTERNAL = 28
    STORAGE_FULL = 29
    COHORT_REFUSED = 30
    KEY_SPENT = 31
    BANNED = 32
    CERTIFICATE_EXPIRED = 33
    ENROLMENT_PENDING = 34
    BUSY = 35


class Reaction(Enum):
    """What an agent does when it is refused."""

    RECONNECT = "connect again with backoff"
    SKIP_STEP = "drop the step and wait for the next invitation"
    RESYNC = "forget the run's global state and apply its history anew"
    ENROL = "stop and tell the device's owner to join again with a new token"
    UPGRADE = "stop and tell the device's owner to upgrade"
    STOP = "stop and tell the operator"

    @property
    def ends_session(self) -> bool:
        """Whether trying again cannot help."""
        return self in (Reaction.ENROL, Reaction.UPGRADE, Reaction.STOP)


@dataclass(frozen=True)
class Rule:
    """How one reason travels (gRPC code) and what the agent does about it."""

    code: grpc.StatusCode
    reaction: Reaction


_Code = grpc.StatusCode
RULES: dict[Reason, Rule] = {
    Reason.INVALID_TOKEN: Rule(_Code.UNAUTHENTICATED, Reaction.ENROL),
    Reason.TOKEN_EXPIRED: Rule(_Code.UNAUTHENTICATED, Reaction.ENROL),
    Reason.NOT_PERMITTED: Rule(_Code.PERMISSION_DENIED, Reaction.STOP),
    Reason.PROTOCOL_UNSUPPORTED: Rule(_Code.FAILED_PRECONDITION, Reaction.UPGRADE),
    Reason.MALFORMED: Rule(_Code.INVALID_ARGUMENT, Reaction.SKIP_STEP),
    Reason.TOO_LARGE: Rule(_Code.INVALID_ARGUMENT, Reaction.SKIP_STEP),
    Reason.DIGEST_MISMATCH: Rule(_Code.DATA_LOSS, Reaction.SKIP_STEP),
    Reason.NOT_FOUND: Rule(_Code.NOT_FOUND, Reaction.SKIP_STEP),
    Reason.WRONG_ROUND: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.NOT_IN_COHORT: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.NOT_FINITE: Rule(_Code.INVALID_ARGUMENT, Reaction.SKIP_STEP),
    Reason.WEIGHT_OUT_OF_RANGE: Rule(_Code.INVALID_ARGUMENT, Reaction.SKIP_STEP),
    Reason.PROTECTION_TOO_WEAK: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.PLAN_MISMATCH: Rule(_Code.DATA_LOSS, Reaction.SKIP_STEP),
    Reason.PLAN_UNSUPPORTED: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.DATA_UNREADABLE: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.DATA_COLUMN_MISSING: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.DATA_LABEL_UNKNOWN: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.DATA_EMPTY: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.TRAINING_FAILED: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.KEY_UNAVAILABLE: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.SUM_NOT_VERIFIED: Rule(_Code.DATA_LOSS, Reaction.SKIP_STEP),
    Reason.STATE_DIVERGED: Rule(_Code.DATA_LOSS, Reaction.RESYNC),
    Reason.QUORUM_NOT_REACHED: Rule(_Code.ABORTED, Reaction.SKIP_STEP),
    Reason.DEADLINE_PASSED: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.RUN_CANCELLED: Rule(_Code.ABORTED, Reaction.SKIP_STEP),
    Reason.SUPERSEDED: Rule(_Code.ABORTED, Reaction.STOP),
    Reason.INTERNAL: Rule(_Code.INTERNAL, Reaction.RECONNECT),
    Reason.STORAGE_FULL: Rule(_Code.RESOURCE_EXHAUSTED, Reaction.RECONNECT),
    Reason.COHORT_REFUSED: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.KEY_SPENT: Rule(_Code.FAILED_PRECONDITION, Reaction.SKIP_STEP),
    Reason.BANNED: Rule(_Code.PERMISSION_DENIED, Reaction.STOP),
    Reason.CERTIFICATE_EXPIRED: Rule(_Code.UNAUTHENTICATED, Reaction.ENROL),
    Reason.ENROLMENT_PENDING: Rule(_Code.UNAVAILABLE, Reaction.RECONNECT),
    Reason.BUSY: Rule(_Code.RESOURCE_EXHAUSTED, Reaction.RECONNECT),
}


class FedloomError(Exception):
    """Root of the errors that this project raises on purpose."""


class Refused(FedloomError):
    """A step is refused. `subject` says what was expected and found; it never holds a secret.

    `retry_after`, in seconds, is the earliest sensible time for another try; None: the table says.
    """

    def __init__(self, reason: Reason, subject: str, retry_after: float | None = None) -> None:
        super().__init__(f"{reason.name}: {subject}")
        self.reason = reason
        self.subject = subject
        self.retry_after = retry_after


class ConfigError(FedloomError):
    """A file or option that a person wrote is wrong."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


def refusal_details(refused: Refused) -> refusal_pb2.RefusalDetails:
    """Return the refusal as it travels; a subject that is too long is cut at a character."""
    # A file name may hold bytes that are no UTF-8 (lone surrogates in Python): they become "?".
    utf8 = refused.subject.encode(errors="replace")
    subject = utf8[:MAX_SUBJECT_BYTES].decode(errors="ignore")
    details = refusal_pb2.RefusalDetails(
        reason=refusal_pb2.Reason.ValueType(refused.reason), subject=subject
    )
    if refused.retry_after is not None:
        details.retry_after.FromTimedelta(timedelta(seconds=refused.retry_after))
    return details


def refused_from_details(details: refusal_pb2.RefusalDetails) -> Refused:
    """Return the peer's refusal.

    A reason that this version does not know counts as INTERNAL, and REASON_UNSPECIFIED, which is
    never sent, as MALFORMED.
    """
    try:
        reason = Reason(details.reason) if details.reason else Reason.MALFORMED
    except ValueError:
        reason = Reason.INTERNAL
    # Read without Duration's own conversion, which raises on a foreign value out of range.
    later = details.retry_after.seconds + details.retry_after.nanos / 1e9
    wait = min(max(0.0, later), MAX_RETRY_SECONDS) if details.HasField("retry_after") else None
    return Refused(reason, details.subject[:MAX_SUBJECT_BYTES], wait)


def refusal_trailers(refused: Refused) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries the refusal when an RPC ends with it."""
    details = refusal_details(refused)
    # The message repeats the cut subject: trailers above 8 KiB would cost the whole refusal.
    status = Status(
        code=RULES[refused.reason].code.value[0],
        message=f"{refused.reason.name}: {details.subject}",
    )
    status.details.add().Pack(details)
    return ((_STATUS_KEY, status.SerializeToString()),)


def refused_from_rpc(error: grpc.aio.AioRpcError) -> Refused | None:
    """Return the refusal that ended an RPC; None for any other cause (network, cancellation)."""
    for key, value in error.trailing_metadata() or ():
        if key != _STATUS_KEY or not isinstance(value, bytes):
            continue
        details = refusal_pb2.RefusalDetails()
        try:
            status = Status.FromString(value)
            if len(status.details) == 1 and status.details[0].Unpack(details):
                return refused_from_details(details)
        except DecodeError:
            continue  # not bytes of ours: the RPC's own code is all that is known
    return None
