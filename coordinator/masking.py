"""The coordinator's part in one cohort's masks (`crypto.cohort`, the relay's half).

It carries what members say to each other and learns, at the end, which masks are left in the sum.
It holds no secret of its own, and nothing that it could do wrong opens a smaller sum.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from coordinator.metrics import CryptoStep, Metrics
from crypto import CryptoError, LocalFault, cohort
from crypto.errors import StaleAttempt, StepRefused
from crypto.masks import Correction
from fedloom.certified_keys import IDENTITY_KEY, CertifiedKey, check_certified
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

Send = Callable[[str, bytes], None]  # (agent, message)
Remember = Callable[[str, bytes], None]  # (agent, message), before it is acted upon


@dataclass(frozen=True)
class Candidate:
    """An agent that may become a member: its advertisement, and the identity that signed it."""

    advertisement: cohort.Advertisement
    identity: control_pb2.IdentityKey


def read_candidate(
    agent: str,
    attempt: cohort.AttemptId,
    advertisement: bytes,
    identity: control_pb2.IdentityKey | None,
    authority: x509.Certificate,
) -> Candidate:
    """Verify what came with READY, so that one bad key does not spoil a cohort; raises Refused."""
    if identity is None:
        raise Refused(Reason.COHORT_REFUSED, "expected keys for the cohort with READY")
    key = CertifiedKey.of(identity)
    check_certified(IDENTITY_KEY, agent, key, authority, datetime.now(UTC))
    candidate = known_candidate(advertisement, identity)
    stated = candidate.advertisement
    if stated.agent_id != agent:
        raise Refused(Reason.COHORT_REFUSED, "expected the agent's own advertisement")
    if stated.attempt != attempt:
        raise Refused(Reason.WRONG_ROUND, f"expected an advertisement for attempt {attempt}")
    if not cohort.ed25519_valid(identity.public_key, stated.statement(), stated.signature):
        raise Refused(Reason.COHORT_REFUSED, "expected an advertisement signed by the identity")
    return candidate


def known_candidate(advertisement: bytes, identity: control_pb2.IdentityKey) -> Candidate:
    """Return a candidate as it was verified before; raises Refused for what is none."""
    stated = _decoded(advertisement)
    if not isinstance(stated, cohort.Advertisement):
        raise Refused(Reason.COHORT_REFUSED, "expected the agent's own advertisement")
    return Candidate(stated, identity)


class Masking:
    """One attempt: from the advertisements to the correction of its sum."""

    def __init__(
        self,
        attempt: cohort.AttemptId,
        minimum: int,
        candidates: Mapping[str, Candidate],
        send: Send,
        remember: Remember,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._candidates = candidates
        self._send = send
        self._remember = remember
        self._settled: asyncio.Future[Correction | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._state = cohort.new_attempt(attempt, minimum)
        for name in sorted(candidates):
            self._handle(candidates[name].advertisement)
        self._state, _ = cohort.handle_relay(
            self._state, cohort.FormCohort(attempt), self._signed_by
        )
        if self._state.cohort is None:
            raise Refused(Reason.QUORUM_NOT_REACHED, "expected members with usable keys")
        self.cohort = self._state.cohort

    @property
    def identities(self) -> list[control_pb2.IdentityKey]:
        """Each member's identity, in order of slots."""
        return [self._candidates[member.agent_id].identity for member in self.cohort.members]

    def heard(self, agent: str, message: bytes) -> None:
        """Carry a member's message on; raises Refused for one that it may not send."""
        stated = _decoded(message)
        if not isinstance(stated, cohort.Boxes | cohort.Endorsement | cohort.Release):
            raise Refused(Reason.MALFORMED, f"expected no {type(stated).__name__} from a member")
        if stated.slot != self.cohort.slot(agent):
            raise Refused(Reason.COHORT_REFUSED, "expected a message of the agent's own slot")
        self._handle(stated, lambda: self._remember(agent, message))

    def counted(self, slot: int, sha256: bytes) -> None:
        """A member's update is in the sum."""
        self._handle(cohort.Uploaded(self._state.attempt, slot, sha256))

    @property
    def slots(self) -> tuple[int, ...]:
        """The accepted members, ascending; none before the uploads are closed."""
        return () if self._state.acceptance is None else self._state.acceptance.slots

    def close_uploads(self) -> None:
        """No update is added any more: what is in the sum becomes the accepted list."""
        self._handle(cohort.CloseUploads(self._state.attempt))

    async def settled(self, seconds: float) -> Correction | None:
        """Wait for enough members to vouch and release; None when the sum cannot be opened."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._settled), seconds)
        except TimeoutError:
            self._handle(cohort.CloseVouching(self._state.attempt))
            if not self._settled.done():
                self._handle(cohort.CloseReleases(self._state.attempt))
            return await self._settled

    def repeat(self, agent: str) -> None:
        """Tell a member that connected again what it may have missed since the cohort."""
        for effect in cohort.repeat(self._state, agent):
            if not isinstance(effect.message, cohort.Cohort):
                self._send(effect.agent_id, effect.message.encode())

    def _handle(
        self, event: cohort.RelayEvent, remember: Callable[[], None] = lambda: None
    ) -> None:
        before, begun = self._state, time.perf_counter()
        try:
            after, effects = cohort.handle_relay(before, event, self._signed_by)
        except LocalFault:
            raise
        except (StaleAttempt, StepRefused) as error:
            raise Refused(Reason.WRONG_ROUND, str(error)) from error
        except CryptoError as error:
            raise Refused(Reason.COHORT_REFUSED, str(error)) from error
        if after is not before:
            remember()
        self._state = after
        for effect in effects:
            match effect:
                case cohort.Send(agent_id, message):
                    self._send(agent_id, message.encode())
                case cohort.Correct(correction):
                    seconds = time.perf_counter() - begun
                    self._metrics.crypto_seconds.labels(CryptoStep.CORRECT).observe(seconds)
                    self._settle(correction)
                case cohort.Abandon():
                    self._settle(None)

    def _settle(self, correction: Correction | None) -> None:
        if not self._settled.done():
            self._settled.set_result(correction)

    def _signed_by(self, agent_id: str, statement: bytes, signature: bytes) -> bool:
        candidate = self._candidates.get(agent_id)
        return candidate is not None and cohort.ed25519_valid(
            candidate.identity.public_key, statement, signature
        )


def _decoded(message: bytes) -> cohort.Message:
    try:
        return cohort.decode(message)
    except CryptoError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error
