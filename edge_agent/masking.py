"""This device's part in its cohorts' masks, in one run (`crypto.cohort`, the member's half).

What it promised is on disk, mode 0600, before the answer that promises it is sent: a device that is
started again neither releases twice nor vouches for a second list. Keep the file out of backups.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crypto import CryptoError, LocalFault, cohort
from crypto.errors import StaleAttempt, StepRefused
from crypto.masks import Mask
from edge_agent.identity import Identity
from fedloom.errors import Reason, Refused
from fedloom.secret_files import write_secret
from fedloom.terms import MINIMUM_SUM
from fedloom.v1 import control_pb2

_STATE_FILE = "masks.state"
_COHORT_FILE = "masks.cohort"


class Masking:
    """Advertises, deals, vouches and releases; raises Refused for what must not be followed."""

    def __init__(self, folder: Path, identity: Identity, run_id: bytes, minimum: int) -> None:
        """`minimum`: fewest updates in a sum, as the run states it to this device's owner."""
        self._folder = folder
        self._identity = identity
        self._keys: dict[str, bytes] = {}  # agent -> Ed25519 public key, of the open cohort
        self._tools = cohort.MemberTools(
            cohort.ed25519_signer(identity.identity_key),
            self._signed_by,
            cohort.MemberPolicy(max(MINIMUM_SUM, minimum)),
        )
        path = folder / _STATE_FILE
        if path.exists():
            self._state = cohort.MemberState.decode(path.read_bytes())
            self._restore_keys()
        else:
            self._state = cohort.new_member(identity.agent_id, run_id)

    @property
    def slot(self) -> int:
        """This device's place in the cohort."""
        return self._state.slot

    @property
    def digest(self) -> bytes:
        """Digest of the cohort that this device took up."""
        if self._state.cohort is None:
            raise Refused(Reason.WRONG_ROUND, "expected a cohort first")
        return self._state.cohort.digest

    @property
    def upload_sha256(self) -> bytes:
        """Digest of the upload that was fixed for this attempt; empty before."""
        return self._state.upload

    @property
    def has_shares(self) -> bool:
        """Whether the others' shares are here, so that this device may upload or has done so."""
        phases = (cohort.MemberPhase.MASKED, cohort.MemberPhase.UPLOADING)
        return self._state.phase in phases

    def masks(self) -> tuple[Mask, ...]:
        """Return what this attempt's update is masked with."""
        return cohort.masks(self._state)

    def advertise(self, round_number: int, attempt: int) -> bytes:
        """Join an attempt and return the advertisement; the same one when asked again."""
        attempt_id = cohort.AttemptId(self._state.attempt.run_id, round_number, attempt)
        return _required(self._handle(cohort.Join(attempt_id, os.urandom(cohort.SECRET_SIZE))))

    def take_up(self, message: control_pb2.Cohort) -> bytes:
        """Verify every member of the cohort and return this device's boxes for them."""
        stated = _decoded(message.mask_cohort)
        if not isinstance(stated, cohort.Cohort):
            raise Refused(Reason.MALFORMED, "expected a cohort with its members' advertisements")
        self._learn_keys((member.agent_id for member in stated.members), message)
        boxes = self._handle(stated)
        kept = self._folder / _COHORT_FILE
        kept.write_bytes(message.SerializeToString())
        return _required(boxes)

    def fix_upload(self, sha256: bytes) -> None:
        """Commit to the encoded update, before its first byte is sent."""
        self._handle(cohort.UploadReady(self._state.attempt, sha256))

    def heard(self, message: bytes) -> bytes | None:
        """Follow a message of the coordinator's; return the answer, if it has one."""
        stated = _decoded(message)
        if isinstance(stated, cohort.Boxes | cohort.Acceptance | cohort.Certificate):
            return self._handle(stated)
        raise Refused(Reason.MALFORMED, f"expected no {type(stated).__name__} from a coordinator")

    def _handle(self, event: cohort.MemberEvent) -> bytes | None:
        with _refusing_steps():
            state, answer = cohort.handle_member(self._state, event, self._tools)
        if state != self._state:
            write_secret(self._folder / _STATE_FILE, state.encode())
            self._state = state
        return None if answer is None else answer.encode()

    def _signed_by(self, agent_id: str, statement: bytes, signature: bytes) -> bool:
        key = self._keys.get(agent_id)
        return key is not None and cohort.ed25519_valid(key, statement, signature)

    def _learn_keys(self, agents: Iterable[str], message: control_pb2.Cohort) -> None:
        names, identities = list(agents), list(message.identities)
        if len(names) != len(identities):
            raise Refused(Reason.MALFORMED, f"expected {len(names)} identities of the members")
        self._keys = {
            name: self._identity.verified_identity_key(name, identity)
            for name, identity in zip(names, identities, strict=True)
        }

    def _restore_keys(self) -> None:
        path = self._folder / _COHORT_FILE
        if self._state.cohort is not None and path.exists():
            message = control_pb2.Cohort.FromString(path.read_bytes())
            self._learn_keys((m.agent_id for m in self._state.cohort.members), message)


@contextmanager
def _refusing_steps() -> Iterator[None]:
    """Turn what the protocol refuses into what the coordinator is told."""
    try:
        yield
    except (StaleAttempt, StepRefused) as error:
        raise Refused(Reason.WRONG_ROUND, str(error)) from error
    except LocalFault:
        raise
    except CryptoError as error:
        raise Refused(Reason.COHORT_REFUSED, str(error)) from error


def _decoded(message: bytes) -> cohort.Message:
    try:
        return cohort.decode(message)
    except CryptoError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error


def _required(answer: bytes | None) -> bytes:
    if answer is None:
        raise Refused(Reason.WRONG_ROUND, "expected a step that this attempt has not passed")
    return answer
