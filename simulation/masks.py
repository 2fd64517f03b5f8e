"""A cohort's masks with all members in this process: the real protocol, spoken by nobody to nobody.

Members and relay are the state machines of `crypto.cohort`, keys and signatures are real. One
signature is verified once and not by every member, since all of them would find the same. What is
random here leaves the sum again: results do not depend on it.
"""

import os
from collections import deque
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from crypto import cohort
from crypto.masks import Correction, Mask


class MaskedCohort:
    """One attempt, from its advertisements to the correction of its sum."""

    def __init__(self, attempt: cohort.AttemptId, minimum: int, members: Sequence[str]) -> None:
        """Have all members deal their shares; `members` in the order of their slots."""
        self._keys = {name: Ed25519PrivateKey.generate() for name in members}
        self._public = {n: key.public_key().public_bytes_raw() for n, key in self._keys.items()}
        self._verified: dict[tuple[str, bytes, bytes], bool] = {}
        self._states: dict[str, cohort.MemberState] = {}
        self._tools = {
            name: cohort.MemberTools(
                cohort.ed25519_signer(key), self._signed_by, cohort.MemberPolicy(minimum)
            )
            for name, key in self._keys.items()
        }
        self._waiting: deque[cohort.Send] = deque()
        self._correction: Correction | None = None
        self._attempt = attempt
        advertised = [self._advertised(name) for name in members]
        self._relay = cohort.new_attempt(attempt, minimum, advertised)
        for name in members:
            self._waiting.extend(cohort.repeat(self._relay, name))
        self._deliver()

    @property
    def digest(self) -> bytes:
        """What the attempt's updates are bound to."""
        return self._relay.cohort.digest

    def masks(self, member: str) -> tuple[Mask, ...]:
        """Return what a member's update is masked with."""
        return cohort.masks(self._states[member])

    def uploaded(self, member: str, sha256: bytes) -> None:
        """A member has sent its update, and it is in the sum."""
        self._take(member, cohort.UploadReady(self._attempt, sha256))
        slot = self._states[member].slot
        self._tell(cohort.Uploaded(self._attempt, slot, sha256))
        self._deliver()

    def correction(self) -> Correction | None:
        """Close the attempt; None when its sum cannot be opened."""
        phases = cohort.RelayPhase
        for closing, phase in (
            (cohort.CloseUploads, phases.COLLECTING),
            (cohort.CloseVouching, phases.VOUCHING),
            (cohort.CloseReleases, phases.RELEASING),
        ):
            if self._relay.phase is phase:
                self._tell(closing(self._attempt))
                self._deliver()
        return self._correction

    def _advertised(self, name: str) -> cohort.Advertisement:
        self._states[name] = cohort.new_member(name, self._attempt.run_id)
        answer = self._take(name, cohort.Join(self._attempt, os.urandom(cohort.SECRET_SIZE)))
        if not isinstance(answer, cohort.Advertisement):
            raise TypeError(f"expected an advertisement, found {type(answer).__name__}")
        return answer

    def _take(self, name: str, event: cohort.MemberEvent) -> cohort.Message | None:
        state, answer = cohort.handle_member(self._states[name], event, self._tools[name])
        self._states[name] = state
        return answer

    def _tell(self, event: cohort.RelayEvent) -> None:
        self._relay, effects = cohort.handle_relay(self._relay, event, self._signed_by)
        for effect in effects:
            match effect:
                case cohort.Send():
                    self._waiting.append(effect)
                case cohort.Correct():
                    self._correction = effect.correction
                case cohort.Abandon():
                    pass  # no correction: the caller's round is void

    def _deliver(self) -> None:
        while self._waiting:
            sent = self._waiting.popleft()
            answer = self._take(sent.agent_id, sent.message)  # type: ignore[arg-type]
            if isinstance(answer, cohort.Boxes | cohort.Endorsement | cohort.Release):
                self._tell(answer)

    def _signed_by(self, name: str, statement: bytes, signature: bytes) -> bool:
        asked = (name, statement, signature)
        if asked not in self._verified:
            known = self._public.get(name)
            valid = known is not None and cohort.ed25519_valid(known, statement, signature)
            self._verified[asked] = valid
        return self._verified[asked]
