"""Stand-in: who is in the federation, as far as the store of this branch tells."""

from dataclasses import dataclass, replace

from coordinator.store import Store
from fedloom.errors import ConfigError, Reason, Refused


@dataclass(frozen=True)
class AgentRecord:
    agent_id: str
    enrolled_at: float
    certificate_until: float
    banned_at: float | None
    ban_reason: str | None
    last_seen: float | None


@dataclass(frozen=True)
class Invitation:
    id: str
    name: str
    expires_at: float
    uses: int
    used: int
    revoked_at: float | None


class Roster:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._invitations: dict[bytes, Invitation] = {}
        self._bans: dict[str, tuple[float, str]] = {}

    def add_invitation(
        self, secret_sha256: bytes, name: str, expires_at: float, uses: int = 1
    ) -> Invitation:
        if " " in name or not 1 <= uses <= 10_000:
            raise ConfigError("name", f"expected up to 64 of a-z, 0-9 and '-', found {name!r}")
        if secret_sha256 not in self._invitations:
            self._store.add_invitation(secret_sha256, name, expires_at)
            found = Invitation(secret_sha256.hex()[:8], name, expires_at, uses, 0, None)
            self._invitations[secret_sha256] = found
        return self._invitations[secret_sha256]

    def invitations(self) -> list[Invitation]:
        return sorted(self._invitations.values(), key=lambda i: -i.expires_at)

    def revoke_invitation(self, invitation_id: str, at: float) -> Invitation:
        for key, found in self._invitations.items():
            if found.id == invitation_id:
                self._invitations[key] = replace(found, revoked_at=found.revoked_at or at)
                return self._invitations[key]
        raise Refused(Reason.NOT_FOUND, f"expected the id of one invitation, {invitation_id!r}")

    def agents(self) -> list[AgentRecord]:
        return [self.agent(name) for name, _ in self._store.agents()]

    def agent(self, agent_id: str) -> AgentRecord:
        for name, at in self._store.agents():
            if name == agent_id:
                banned = self._bans.get(name, (None, None))
                return AgentRecord(name, at, at + 365 * 86400.0, banned[0], banned[1], None)
        raise Refused(Reason.NOT_FOUND, f"expected an enrolled agent, found none of {agent_id!r}")

    def ban(self, agent_id: str, reason: str, at: float) -> AgentRecord:
        self._bans[agent_id] = (self._bans.get(agent_id, (at, ""))[0], reason)
        return self.agent(agent_id)

    def unban(self, agent_id: str) -> AgentRecord:
        self._bans.pop(agent_id, None)
        return self.agent(agent_id)
