"""This device's part in its cohorts' masks, in one run (`crypto.cohort`, the member's half).

What it promised is on disk, mode 0600, before the answer that promises it is sent: a device that is
started again neither releases twice nor vouches for a second list. Keep the file out of backups.

Signatures, shares and boxes take tens of milliseconds in large cohorts, and a disk may take longer
to store what follows from them: both are done in threads. A step that is given up while it is
computed has changed nothing; one that is being stored is stored to its end before that is noticed.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Moved:
    """Where an event leads."""

    state: cohort.MemberState
    stored: bytes | None  # the state, where it is another one
    answer: bytes | None


class Masking:
    """Advertises, deals, vouches and releases; raises Refused for what must not be followed.

    One step at a time. To make one may take as long as a step: each member's key is verified.
    """

    def __init__(
        self, folder: Path, identity: Identity, run_id: bytes, minimum: int, groups: int = 1
    ) -> None:
        """`minimum`: fewest updates in a round, as the run states it to this device's owner.

        They are in so many `groups`, each with `MINIMUM_SUM` at least (`crypto.groups`).
        """
        self._folder = folder
        self._identity = identity
        self._sign = cohort.ed25519_signer(identity.identity_key)
        self._policy = cohort.MemberPolicy(max(MINIMUM_SUM, minimum), groups)
        self._keys: Mapping[str, bytes] = {}  # agent -> Ed25519 public key, of the open cohort
        path = folder / _STATE_FILE
        if path.exists():
            self._state = cohort.MemberState.decode(path.read_bytes())
            self._keys = self._kept_keys()
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

    def has_vouched(self, round_number: int) -> bool:
        """Tell whether this device vouched for a list in a round: that sum may have been opened."""
        vouched = self._state.phase >= cohort.MemberPhase.ENDORSED
        return vouched and self._state.attempt.round == round_number

    @property
    def has_shares(self) -> bool:
        """Whether the others' shares are here, so that this device may upload or has done so."""
        phases = (cohort.MemberPhase.MASKED, cohort.MemberPhase.UPLOADING)
        return self._state.phase in phases

    def masks(self) -> tuple[Mask, ...]:
        """Return what this attempt's update is masked with."""
        return cohort.masks(self._state)

    async def advertise(self, round_number: int, attempt: int) -> bytes:
        """Join an attempt and return the advertisement; the same one when asked again."""
        attempt_id = cohort.AttemptId(self._state.attempt.run_id, round_number, attempt)
        event = cohort.Join(attempt_id, os.urandom(cohort.SECRET_SIZE))
        return _required(await self._follow(event))

    async def take_up(self, message: control_pb2.Cohort) -> bytes:
        """Verify every member of the cohort and return this device's boxes for them."""
        keys, moved = await asyncio.to_thread(self._taken_up, message)
        await self._keep(moved, message)
        self._keys = keys
        return _required(moved.answer)

    def _taken_up(self, message: control_pb2.Cohort) -> tuple[Mapping[str, bytes], _Moved]:
        stated = _decoded(message.mask_cohort)
        if not isinstance(stated, cohort.Cohort):
            raise Refused(Reason.MALFORMED, "expected a cohort with its members' advertisements")
        keys = self._verified_keys(stated, message)
        return keys, self._moved(stated, keys)

    async def fix_upload(self, sha256: bytes) -> None:
        """Commit to the encoded update, before its first byte is sent."""
        await self._follow(cohort.UploadReady(self._state.attempt, sha256))

    async def heard(self, message: bytes) -> bytes | None:
        """Follow a message of the coordinator's; return the answer, if it has one."""
        moved = await asyncio.to_thread(self._heard, message)
        await self._keep(moved)
        return moved.answer

    def _heard(self, message: bytes) -> _Moved:
        stated = _decoded(message)
        if isinstance(stated, cohort.Boxes | cohort.Acceptance | cohort.Certificate):
            return self._moved(stated, self._keys)
        raise Refused(Reason.MALFORMED, f"expected no {type(stated).__name__} from a coordinator")

    async def _follow(self, event: cohort.MemberEvent) -> bytes | None:
        moved = await asyncio.to_thread(self._moved, event, self._keys)
        await self._keep(moved)
        return moved.answer

    def _moved(self, event: cohort.MemberEvent, keys: Mapping[str, bytes]) -> _Moved:
        """Return where the event leads; nothing changes by that."""

        def signed_by(agent_id: str, statement: bytes, signature: bytes) -> bool:
            key = keys.get(agent_id)
            return key is not None and cohort.ed25519_valid(key, statement, signature)

        before = self._state
        with _refusing_steps():
            tools = cohort.MemberTools(self._sign, signed_by, self._policy)
            after, answer = cohort.handle_member(before, event, tools)
        stored = None if after == before else after.encode()
        return _Moved(after, stored, None if answer is None else answer.encode())

    async def _keep(self, moved: _Moved, message: control_pb2.Cohort | None = None) -> None:
        """Take the state for ours once it is stored, to the end even when the step is given up."""
        keeping = asyncio.create_task(self._stored(moved, message))
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.wait({keeping})
            raise

    async def _stored(self, moved: _Moved, message: control_pb2.Cohort | None) -> None:
        await asyncio.to_thread(self._write, moved, message)
        self._state = moved.state

    def _write(self, moved: _Moved, message: control_pb2.Cohort | None) -> None:
        if message is not None:  # first: whoever knows the cohort also knows its identities
            (self._folder / _COHORT_FILE).write_bytes(message.SerializeToString())
        if moved.stored is not None:
            write_secret(self._folder / _STATE_FILE, moved.stored)

    def _verified_keys(
        self, stated: cohort.Cohort, message: control_pb2.Cohort
    ) -> Mapping[str, bytes]:
        names, identities = [member.agent_id for member in stated.members], message.identities
        if len(names) != len(identities):
            raise Refused(Reason.MALFORMED, f"expected {len(names)} identities of the members")
        return {
            name: self._identity.verified_identity_key(name, identity)
            for name, identity in zip(names, identities, strict=True)
        }

    def _kept_keys(self) -> Mapping[str, bytes]:
        path = self._folder / _COHORT_FILE
        if self._state.cohort is None or not path.exists():
            return {}
        message = control_pb2.Cohort.FromString(path.read_bytes())
        return self._verified_keys(self._state.cohort, message)


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
