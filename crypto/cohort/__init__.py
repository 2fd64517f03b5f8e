"""How a cohort agrees on masks, and gives them up for exactly one sum: no I/O, no clock.

`member` is the device's state machine, `relay` the coordinator's; `messages` are what they say to
each other. The picture and what each party learns are in ../README.md.
"""

from .decoding import decode
from .identity import Sign, Verify, ed25519_signer, ed25519_valid
from .member import handle as handle_member
from .member import masks
from .member_state import (
    Join,
    MemberEvent,
    MemberPhase,
    MemberPolicy,
    MemberState,
    MemberTools,
    UploadReady,
    new_member,
)
from .messages import (
    Acceptance,
    Advertisement,
    AttemptId,
    Boxes,
    Certificate,
    Cohort,
    Endorsement,
    Message,
    Release,
)
from .quorum import MASK_DEGREE, SECRET_SIZE, quorum, threshold, tolerated
from .relay import check_advertisement, new_attempt, repeat
from .relay import handle as handle_relay
from .relay_state import (
    Abandon,
    CloseReleases,
    CloseSharing,
    CloseUploads,
    CloseVouching,
    Correct,
    RelayEffect,
    RelayEvent,
    RelayPhase,
    RelayState,
    Send,
    Uploaded,
)

__all__ = [
    "MASK_DEGREE",
    "SECRET_SIZE",
    "Abandon",
    "Acceptance",
    "Advertisement",
    "AttemptId",
    "Boxes",
    "Certificate",
    "CloseReleases",
    "CloseSharing",
    "CloseUploads",
    "CloseVouching",
    "Cohort",
    "Correct",
    "Endorsement",
    "Join",
    "MemberEvent",
    "MemberPhase",
    "MemberPolicy",
    "MemberState",
    "MemberTools",
    "Message",
    "RelayEffect",
    "RelayEvent",
    "RelayPhase",
    "RelayState",
    "Release",
    "Send",
    "Sign",
    "UploadReady",
    "Uploaded",
    "Verify",
    "check_advertisement",
    "decode",
    "ed25519_signer",
    "ed25519_valid",
    "handle_member",
    "handle_relay",
    "masks",
    "new_attempt",
    "new_member",
    "quorum",
    "repeat",
    "threshold",
    "tolerated",
]
