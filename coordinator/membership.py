"""Who may join the federation, who is in it, and who is kept out: the operator's part of it."""

import time
from typing import Protocol

from coordinator.roster import Roster
from coordinator.roster_records import AgentRecord, Invitation
from coordinator.summaries import AgentSummary, InvitationSummary, Page, page
from fedloom.errors import ConfigError, Reason, Refused

MAX_LIFETIME_SECONDS = 366 * 86_400.0
MAX_BAN_REASON = 256


class Presence(Protocol):
    """What only the process that serves agents knows of them."""

    def connected(self) -> frozenset[str]:
        """Return the agents whose control streams are open."""

    def remove(self, agent_id: str, reason: str) -> None:
        """Send a banned agent away, and go on without it."""


class Membership:
    """Invitations and agents; `presence` is there while this process serves agents."""

    def __init__(
        self,
        roster: Roster,
        enrolment_address: str,
        authority_certificate: bytes,
        presence: Presence | None = None,
    ) -> None:
        self.enrolment_address = enrolment_address  # a token needs it, and the certificate (DER)
        self.authority_certificate = authority_certificate
        self._roster = roster
        self._presence = presence

    def invite(
        self, secret_sha256: bytes, name: str, lifetime_seconds: float, uses: int
    ) -> InvitationSummary:
        """Remember an invitation; a repeat with the same digest changes nothing."""
        if not 0 < lifetime_seconds <= MAX_LIFETIME_SECONDS:
            raise ConfigError("lifetime", f"expected up to a year, found {lifetime_seconds:.0f} s")
        if len(secret_sha256) != 32:
            raise Refused(Reason.MALFORMED, "expected a SHA-256 of 32 bytes")
        expires_at = time.time() + lifetime_seconds
        return _invited(self._roster.add_invitation(secret_sha256, name, expires_at, uses))

    def invitations(self, size: int, token: str) -> Page[InvitationSummary]:
        """List invitations, those that expire last first."""
        found = map(_invited, self._roster.invitations())
        return page(found, lambda invitation: invitation.invitation_id, size, token)

    def revoke_invitation(self, invitation_id: str) -> InvitationSummary:
        """Make an invitation worthless; raises Refused(NOT_FOUND)."""
        return _invited(self._roster.revoke_invitation(invitation_id, time.time()))

    def count(self) -> int:
        """Return how many agents are enrolled and not banned."""
        return sum(agent.banned_at is None for agent in self._roster.agents())

    def agents(self, size: int, token: str) -> Page[AgentSummary]:
        """List enrolled agents by name."""
        cut = page(self._roster.agents(), lambda agent: agent.agent_id, size, token)
        return Page(tuple(map(self._agent, cut.items)), cut.next_token)

    def agent(self, agent_id: str) -> AgentSummary:
        """Return one agent; raises Refused(NOT_FOUND)."""
        return self._agent(self._roster.agent(agent_id))

    def ban(self, agent_id: str, reason: str) -> AgentSummary:
        """Keep an agent out."""
        if len(reason) > MAX_BAN_REASON:
            raise ConfigError("reason", f"expected at most {MAX_BAN_REASON} characters")
        banned = self._roster.ban(agent_id, reason, time.time())
        if self._presence is not None:
            self._presence.remove(agent_id, reason)
        return self._agent(banned)

    def unban(self, agent_id: str) -> AgentSummary:
        """Let a banned agent in again."""
        return self._agent(self._roster.unban(agent_id))

    def _agent(self, record: AgentRecord) -> AgentSummary:
        presence = self._presence
        return AgentSummary(
            record.agent_id,
            record.enrolled_at,
            record.certificate_until,
            record.last_seen,
            presence is not None and record.agent_id in presence.connected(),
            record.banned_at,
            record.ban_reason or "",
        )


def _invited(record: Invitation) -> InvitationSummary:
    return InvitationSummary(
        record.id,
        record.name,
        record.expires_at,
        record.uses,
        record.used,
        record.revoked_at,
    )
