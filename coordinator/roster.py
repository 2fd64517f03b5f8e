"""Who is in: invitations, certificate requests, and the agents that they made.

An invitation gives names to keys, as many as it has uses. A key that was named asks for a
certificate; once it is signed, the agent is enrolled, and an older key of the same name is shut
out. Every method is one short transaction, the same on every dialect: what must not happen twice
first locks its row by an update.
"""

import re
from collections.abc import Iterable, Mapping

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.roster_records import (
    AgentRecord,
    CertificateRequest,
    Grant,
    Invitation,
    Row,
    end_of,
    invitation_id_of,
    invitation_of,
    record_of,
    request_of,
)
from coordinator.schema import agents, certificate_requests, invitations
from fedloom.errors import ConfigError, Reason, Refused

__all__ = ["AgentRecord", "CertificateRequest", "Grant", "Invitation", "Roster", "require_name"]

MAX_USES = 10_000
MAX_NAME = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_RENEWAL = b""  # stands in a request for the secret of an invitation


class Roster:
    """The members of the federation, and who may become one."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    # invitations

    def add_invitation(
        self, secret_sha256: bytes, name: str, expires_at: float, uses: int = 1
    ) -> Invitation:
        """Remember that whoever knows the secret may become NAME, or NAME-1, NAME-2, ...

        Numbers are given out when an invitation for several devices is made, and never twice. A
        repeat with the same secret changes nothing. Raises ConfigError.
        """
        require_name(name, uses)
        row = {
            "secret_sha256": secret_sha256,
            "name": name,
            "expires_at": expires_at,
            "uses": uses,
            "used": 0,
        }
        with self._engine.begin() as db:
            if uses > 1:  # locked first: of two made at once, the second counts the first's numbers
                same = sa.update(invitations).where(invitations.c.name == name)
                db.execute(same.values(name=name))
            this = sa.select(invitations).where(invitations.c.secret_sha256 == secret_sha256)
            found = db.execute(this).one_or_none()
            if found is None:
                row["first_number"] = None if uses == 1 else _next_number(db, name)
                db.execute(sa.insert(invitations).values(row))
                found = db.execute(this).one()
            return invitation_of(found)

    def invitations(self) -> list[Invitation]:
        """Return all invitations, those that end last first."""
        query = sa.select(invitations).order_by(
            invitations.c.expires_at.desc(), invitations.c.secret_sha256
        )
        with self._engine.connect() as db:
            return [invitation_of(row) for row in db.execute(query)]

    def revoke_invitation(self, invitation_id: str, at: float) -> Invitation:
        """Make an invitation worthless; agents that have joined with it stay.

        Those that still wait for a signature are forgotten. Raises Refused(NOT_FOUND).
        """
        with self._engine.begin() as db:
            keys = db.execute(sa.select(invitations.c.secret_sha256)).scalars()
            found = [key for key in keys if invitation_id_of(key) == invitation_id]
            if len(found) != 1:
                raise Refused(
                    Reason.NOT_FOUND,
                    f"expected the id of one invitation, found {len(found)} of {invitation_id!r}",
                )
            this = invitations.c.secret_sha256 == found[0]
            standing = this & invitations.c.revoked_at.is_(None)
            db.execute(sa.update(invitations).where(standing).values(revoked_at=at))
            unsigned = certificate_requests.c.chain.is_(None)
            from_it = certificate_requests.c.secret_sha256 == found[0]
            db.execute(sa.delete(certificate_requests).where(from_it & unsigned))
            return invitation_of(db.execute(sa.select(invitations).where(this)).one())

    # certificates

    def redeem(
        self, secret_sha256: bytes, key_sha256: bytes, request: bytes, now: float
    ) -> CertificateRequest:
        """Bind one use of the invitation to a key, and return the request that stands for it.

        The same key may ask again, and later: its answer may have been lost, or not been there.
        Raises Refused(INVALID_TOKEN, TOKEN_EXPIRED or BANNED).
        """
        this = invitations.c.secret_sha256 == secret_sha256
        with self._engine.begin() as db:
            db.execute(sa.update(invitations).where(this).values(used=invitations.c.used))  # locks
            invitation = db.execute(sa.select(invitations).where(this)).one_or_none()
            found = _find_request(db, secret_sha256, key_sha256)
            if invitation is None or (invitation.revoked_at is not None and found is None):
                raise Refused(Reason.INVALID_TOKEN, "expected a token that is known and stands")
            if found is not None:
                _require_not_banned(_find_agent(db, found.agent_id))
                return found
            if invitation.used >= invitation.uses:
                raise Refused(Reason.INVALID_TOKEN, "expected an unused enrolment token")
            if now >= invitation.expires_at:
                raise Refused(Reason.TOKEN_EXPIRED, "the enrolment token has expired")
            agent_id = _next_agent_id(invitation)
            _require_not_banned(_find_agent(db, agent_id))
            db.execute(sa.update(invitations).where(this).values(used=invitation.used + 1))
            made = CertificateRequest(agent_id, key_sha256, request)
            _insert_request(db, secret_sha256, made, now)
            return made

    def renewal(self, request: CertificateRequest, until: float, now: float) -> CertificateRequest:
        """Return the renewal that stands for this key: a signed one, or this request from now on.

        What was signed earlier and ends no later than `until`, the end of the certificate that the
        agent has, is no answer: the request is made anew.
        """
        key = request.public_key_sha256
        with self._engine.begin() as db:
            others = (certificate_requests.c.agent_id == request.agent_id) & (
                certificate_requests.c.public_key_sha256 != key
            )
            renewals = certificate_requests.c.secret_sha256 == _RENEWAL
            db.execute(sa.delete(certificate_requests).where(renewals & others))
            found = _find_request(db, _RENEWAL, key)
            if found is not None and (not found.chain or end_of(found.chain) > until):
                return found
            this = renewals & (certificate_requests.c.public_key_sha256 == key)
            db.execute(sa.delete(certificate_requests).where(this))
            _insert_request(db, _RENEWAL, request, now)
            return request

    def pending(self) -> list[CertificateRequest]:
        """Return the requests that wait for a signature, oldest first."""
        banned = sa.select(agents.c.agent_id).where(agents.c.banned_at.is_not(None))
        query = (
            sa.select(certificate_requests)
            .where(certificate_requests.c.chain.is_(None))
            .where(certificate_requests.c.agent_id.not_in(banned))
            .order_by(certificate_requests.c.requested_at, certificate_requests.c.agent_id)
        )
        with self._engine.connect() as db:
            return [request_of(row) for row in db.execute(query)]

    def grant(
        self, agent_id: str, key_sha256: bytes, chain: Iterable[bytes], now: float
    ) -> Grant | None:
        """Keep a signed certificate for the key that asked for it; None when it does not wait.

        With it a new agent is enrolled, in the place of an older key of its name. A renewal keeps
        the older key until the new one is used.
        """
        chain = tuple(chain)
        waiting = (
            (certificate_requests.c.public_key_sha256 == key_sha256)
            & (certificate_requests.c.agent_id == agent_id)
            & certificate_requests.c.chain.is_(None)
        )
        pem = b"".join(
            x509.load_der_x509_certificate(link).public_bytes(serialization.Encoding.PEM)
            for link in chain
        )
        with self._engine.begin() as db:
            lock = sa.update(certificate_requests).where(waiting)
            db.execute(lock.values(agent_id=agent_id))
            query = sa.select(certificate_requests.c.secret_sha256).where(waiting)
            secrets = list(db.execute(query).scalars())
            if not secrets:
                return None
            db.execute(sa.update(certificate_requests).where(waiting).values(chain=pem))
            if all(secret == _RENEWAL for secret in secrets):
                _admit_next_key(db, agent_id, key_sha256, end_of(chain))
                return Grant.RENEWED
            _enrol(db, agent_id, key_sha256, end_of(chain), now)
            return Grant.ENROLLED

    # agents

    def agents(self) -> list[AgentRecord]:
        """Return every enrolled agent, by name."""
        with self._engine.connect() as db:
            rows = db.execute(sa.select(agents).order_by(agents.c.agent_id))
            return [record_of(row) for row in rows]

    def count(self) -> int:
        """Return how many agents are enrolled and not banned."""
        query = sa.select(sa.func.count()).where(agents.c.banned_at.is_(None))
        with self._engine.connect() as db:
            return int(db.execute(query.select_from(agents)).scalar_one())

    def agent(self, agent_id: str) -> AgentRecord:
        """Return one agent; raises Refused(NOT_FOUND)."""
        with self._engine.connect() as db:
            return record_of(_require_agent(db, agent_id))

    def ban(self, agent_id: str, reason: str, at: float) -> AgentRecord:
        """Keep an agent out; a repeat keeps the time and takes the reason. Raises NOT_FOUND."""
        since = sa.func.coalesce(agents.c.banned_at, at)
        return self._change(agent_id, {"banned_at": since, "ban_reason": reason})

    def unban(self, agent_id: str) -> AgentRecord:
        """Let an agent in again; raises NOT_FOUND."""
        return self._change(agent_id, {"banned_at": None, "ban_reason": None})

    def seen(self, agent_id: str, at: float) -> None:
        """Remember that the agent was heard of."""
        this = agents.c.agent_id == agent_id
        with self._engine.begin() as db:
            db.execute(sa.update(agents).where(this).values(last_seen=at))

    def require_member(self, agent_id: str, key_sha256: bytes) -> None:
        """Raise Refused (BANNED, NOT_PERMITTED) unless this is the key of an agent that is in.

        The first use of a renewal's new key shuts the older one out.
        """
        with self._engine.connect() as db:
            row = _find_agent(db, agent_id)
        _require_not_banned(row)
        if row is None or key_sha256 not in (row.public_key_sha256, row.next_key_sha256):
            raise Refused(
                Reason.NOT_PERMITTED, "expected the certificate of this agent's last enrolment"
            )
        if key_sha256 != row.public_key_sha256:
            this = (agents.c.agent_id == agent_id) & (agents.c.next_key_sha256 == key_sha256)
            with self._engine.begin() as db:
                values = {"public_key_sha256": key_sha256, "next_key_sha256": None}
                db.execute(sa.update(agents).where(this).values(values))

    def _change(self, agent_id: str, values: Mapping[str, object]) -> AgentRecord:
        with self._engine.begin() as db:
            db.execute(sa.update(agents).where(agents.c.agent_id == agent_id).values(values))
            return record_of(_require_agent(db, agent_id))


def require_name(name: str, uses: int = 1) -> None:
    """Raise ConfigError unless agents may have this name."""
    if not 1 <= uses <= MAX_USES:
        raise ConfigError("uses", f"expected 1..{MAX_USES}, found {uses}")
    longest = MAX_NAME if uses == 1 else MAX_NAME - len(f"-{MAX_USES * 100}")
    if not _NAME.fullmatch(name) or len(name) > longest:
        raise ConfigError("name", f"expected up to {longest} of a-z, 0-9 and '-', found {name!r}")


def _next_number(db: sa.Connection, name: str) -> int:
    """Return the first number after all that were ever given, or could be, to devices of NAME."""
    sisters = sa.select(invitations.c.first_number + invitations.c.uses).where(
        (invitations.c.name == name) & (invitations.c.uses > 1)
    )
    taken = [0, *(after - 1 for after in db.execute(sisters).scalars())]
    numbered = re.compile(re.escape(name) + r"-([1-9][0-9]{0,8})")
    for column in (agents.c.agent_id, certificate_requests.c.agent_id, invitations.c.name):
        others = db.execute(sa.select(column).where(column.startswith(f"{name}-"))).scalars()
        taken += [int(match[1]) for other in others if (match := numbered.fullmatch(other))]
    return int(max(taken)) + 1


def _next_agent_id(invitation: Row) -> str:
    if invitation.first_number is None:
        return str(invitation.name)
    return f"{invitation.name}-{invitation.first_number + invitation.used}"


# Made once: it is asked with every call, and making it costs more than its answer.
_FIND_AGENT = sa.select(agents).where(agents.c.agent_id == sa.bindparam("agent"))


def _find_agent(db: sa.Connection, agent_id: str) -> Row | None:
    return db.execute(_FIND_AGENT, {"agent": agent_id}).one_or_none()


def _require_agent(db: sa.Connection, agent_id: str) -> Row:
    row = _find_agent(db, agent_id)
    if row is None:
        raise Refused(Reason.NOT_FOUND, f"expected an enrolled agent, found none of {agent_id!r}")
    return row


def _require_not_banned(row: Row | None) -> None:
    if row is not None and row.banned_at is not None:
        raise Refused(Reason.BANNED, str(row.ban_reason))


def _enrol(db: sa.Connection, agent_id: str, key_sha256: bytes, until: float, now: float) -> None:
    row = {
        "agent_id": agent_id,
        "public_key_sha256": key_sha256,
        "next_key_sha256": None,
        "enrolled_at": now,
        "certificate_until": until,
    }
    updated = db.execute(sa.update(agents).where(agents.c.agent_id == agent_id).values(row))
    if updated.rowcount == 0:
        db.execute(sa.insert(agents).values(row))


def _admit_next_key(db: sa.Connection, agent_id: str, key_sha256: bytes, until: float) -> None:
    changed = agents.c.public_key_sha256 != key_sha256
    next_key = sa.case((changed, key_sha256), else_=agents.c.next_key_sha256)
    db.execute(
        sa.update(agents)
        .where(agents.c.agent_id == agent_id)
        .values(next_key_sha256=next_key, certificate_until=until)
    )


def _insert_request(
    db: sa.Connection, secret_sha256: bytes, request: CertificateRequest, now: float
) -> None:
    row = {
        "secret_sha256": secret_sha256,
        "public_key_sha256": request.public_key_sha256,
        "agent_id": request.agent_id,
        "request": request.request,
        "former_key_signature": request.former_key_signature,
        "requested_at": now,
    }
    db.execute(sa.insert(certificate_requests).values(row))


def _find_request(
    db: sa.Connection, secret_sha256: bytes, key_sha256: bytes
) -> CertificateRequest | None:
    query = sa.select(certificate_requests).where(
        (certificate_requests.c.secret_sha256 == secret_sha256)
        & (certificate_requests.c.public_key_sha256 == key_sha256)
    )
    row = db.execute(query).one_or_none()
    return None if row is None else request_of(row)
