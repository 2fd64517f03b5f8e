"""Agents that said READY under masks: their keys for the next cohort, checked as they come.

One bad key would stop a whole cohort, so it never gets into one. A candidate in the journal was
checked before it was written there, and is not checked again.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from coordinator.events import Ready
from crypto import CryptoError, cohort
from fedloom.certified_keys import IDENTITY_KEY, CertifiedKey, check_certified
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2


@dataclass(frozen=True)
class Candidate:
    """An agent that may become a member: its advertisement, and the identity that signed it."""

    advertisement: cohort.Advertisement
    identity: control_pb2.IdentityKey

    @classmethod
    def read(cls, ready: Ready) -> "Candidate":
        """Read what came with READY; raises Refused for what is no advertisement."""
        try:
            stated = cohort.decode(ready.advertisement)
        except CryptoError as error:
            raise Refused(Reason.MALFORMED, str(error)) from error
        if not isinstance(stated, cohort.Advertisement):
            raise Refused(Reason.COHORT_REFUSED, "expected the agent's own advertisement")
        return cls(stated, control_pb2.IdentityKey.FromString(ready.identity))

    def signed(self, agent: str, statement: bytes, signature: bytes) -> bool:
        """Say whether this agent signed a statement."""
        mine = agent == self.advertisement.agent_id
        return mine and cohort.ed25519_valid(self.identity.public_key, statement, signature)


class Candidates:
    """Those of the round in hand."""

    def __init__(self, authority: x509.Certificate) -> None:
        self._authority = authority
        self._kept: dict[str, Candidate] = {}
        # Of N threads that compute, each keeps the event loop waiting for up to 5 ms.
        self._one_by_one = asyncio.Lock()

    async def check(self, ready: Ready, attempt: cohort.AttemptId) -> None:
        """Raise Refused unless its keys can be used in a cohort of this attempt."""
        async with self._one_by_one:
            await asyncio.to_thread(_check, ready, attempt, self._authority)

    def keep(self, ready: Ready) -> None:
        """Keep what was checked."""
        self._kept[ready.agent] = Candidate.read(ready)

    def of(self, members: Iterable[str]) -> dict[str, Candidate]:
        """Return the candidates who become these members."""
        return {agent: self._kept[agent] for agent in members}

    def clear(self) -> None:
        """Forget all: the next round has other keys."""
        self._kept.clear()


def _check(ready: Ready, attempt: cohort.AttemptId, authority: x509.Certificate) -> None:
    candidate = Candidate.read(ready)
    key = CertifiedKey.of(candidate.identity)
    check_certified(IDENTITY_KEY, ready.agent, key, authority, datetime.now(UTC))
    stated = candidate.advertisement
    if stated.agent_id != ready.agent:
        raise Refused(Reason.COHORT_REFUSED, "expected the agent's own advertisement")
    if stated.attempt != attempt:
        raise Refused(Reason.WRONG_ROUND, f"expected an advertisement for attempt {attempt}")
    try:
        cohort.check_advertisement(stated, candidate.signed)
    except CryptoError as error:
        raise Refused(Reason.COHORT_REFUSED, str(error)) from error
