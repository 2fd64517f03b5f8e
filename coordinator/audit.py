"""Who did what: an append-only log in which every entry carries the SHA-256 of the one before.

An entry that is edited, removed or slipped in shows in `verify`. Cutting off the end, or writing
the whole chain anew, shows only to whoever kept a later entry elsewhere: every digest goes to the
process's logs too, which is where an operator who does not trust this machine looks.
"""

import hashlib
import json
import os
import pwd
import time
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa
import structlog

from coordinator.schema import audit
from fedloom.errors import FedloomError

COORDINATOR = "coordinator"  # the actor of what nobody asked for
MAX_NAME_CHARACTERS = 256
MAX_FACTS_CHARACTERS = 4096
FIRST_PREVIOUS = bytes(32)
_log = structlog.get_logger()

Fact = str | int | float | bool | None


class Action(StrEnum):
    """What is worth an entry: whatever changes who may take part, what runs, or a key."""

    AGENT_INVITED = "agent invited"
    INVITATION_REVOKED = "invitation revoked"
    AGENT_ENROLLED = "agent enrolled"
    AGENT_BANNED = "agent banned"
    AGENT_UNBANNED = "agent unbanned"
    CERTIFICATE_ISSUED = "certificate issued"
    CERTIFICATE_REFUSED = "certificate refused"
    AUTHORITY_CHANGED = "authority changed"
    OPERATOR_ADDED = "operator added"
    OPERATOR_REMOVED = "operator removed"
    RUN_STARTED = "run started"
    RUN_PAUSED = "run paused"
    RUN_RESUMED = "run resumed"
    RUN_CANCELLED = "run cancelled"
    RUN_FINISHED = "run finished"
    RUN_KEY_ROTATED = "run key rotated"
    MODEL_EXPORTED = "model exported"
    SERVER_STARTED = "server started"
    SERVER_STOPPED = "server stopped"


@dataclass(frozen=True)
class AuditEntry:
    """One deed; `facts` is the JSON text that was hashed."""

    number: int
    at: float
    actor: str
    action: str  # an `Action`, or one of a newer version
    subject: str
    facts: str
    previous_sha256: bytes
    sha256: bytes

    def digest(self) -> bytes:
        """Return what `sha256` must be: of the previous digest and of all that is stated."""
        stated = [self.number, self.at, self.actor, self.action, self.subject, self.facts]
        return hashlib.sha256(self.previous_sha256 + json.dumps(stated).encode()).digest()


class AuditBroken(FedloomError):
    """The log is not the one that was written; `number` is the first entry that shows it."""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"audit entry {number}: {problem}")
        self.number = number


class AuditLog:
    """Appends to the store's table `audit`; any number of processes may do so at once."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def append(self, actor: str, action: Action, subject: str, **facts: Fact) -> AuditEntry:
        """Write what was done, after it was done; facts never hold a key, a token or data."""
        text = _facts_text(facts)
        for name in (actor, subject):
            if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
                raise ValueError(
                    f"expected 1 to {MAX_NAME_CHARACTERS} printable characters, found {name!r}"
                )
        at = round(time.time(), 3)
        while True:
            last = self._last()
            number, previous = (
                (1, FIRST_PREVIOUS) if last is None else (last.number + 1, last.sha256)
            )
            entry = AuditEntry(number, at, actor, action.value, subject, text, previous, b"")
            row = {**vars(entry), "sha256": entry.digest()}
            try:
                with self._engine.begin() as db:
                    db.execute(sa.insert(audit).values(row))
            except sa.exc.IntegrityError:
                continue  # another process was first with this number: its entry is our previous
            _log.info(
                "audit",
                number=number,
                actor=actor,
                action=action.value,
                subject=subject,
                facts=text,
                sha256=row["sha256"].hex(),
            )
            return AuditEntry(**row)

    def entries(self, after: int = 0, limit: int = 1000) -> list[AuditEntry]:
        """Return up to `limit` entries whose numbers are above `after`, in order."""
        query = sa.select(audit).where(audit.c.number > after).order_by(audit.c.number).limit(limit)
        with self._engine.connect() as db:
            return [AuditEntry(**row._mapping) for row in db.execute(query)]

    def verify(self, known: AuditEntry | None = None) -> int:
        """Return how many entries there are; raises AuditBroken unless all are as written.

        `known` is an entry that was kept elsewhere: it must still be there.
        """
        number, previous = 0, FIRST_PREVIOUS
        while page := self.entries(after=number):
            for entry in page:
                number += 1
                _check(entry, number, previous)
                if known is not None and number == known.number and entry != known:
                    raise AuditBroken(number, "is not the entry that was kept elsewhere")
                previous = entry.sha256
        if known is not None and number < known.number:
            raise AuditBroken(number + 1, f"expected entries up to {known.number}, found none")
        return number

    def _last(self) -> AuditEntry | None:
        query = sa.select(audit).order_by(audit.c.number.desc()).limit(1)
        with self._engine.connect() as db:
            row = db.execute(query).one_or_none()
        return None if row is None else AuditEntry(**row._mapping)


def local_operator() -> str:
    """Return who typed a command on this machine: the actor of the operator's own deeds."""
    try:
        return f"operator {pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:  # a container's user need not have a name
        return f"operator {os.getuid()}"


def _facts_text(facts: dict[str, Fact]) -> str:
    for name, value in facts.items():
        if not isinstance(value, str | int | float | bool | None):  # bytes may be a key
            raise TypeError(f"expected text, a number or a truth for {name}, found {type(value)}")
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    if len(text) > MAX_FACTS_CHARACTERS:
        raise ValueError(f"expected facts of {MAX_FACTS_CHARACTERS} characters, found {len(text)}")
    return text


def _check(entry: AuditEntry, number: int, previous: bytes) -> None:
    if entry.number != number:
        raise AuditBroken(number, f"is missing; the next one is {entry.number}")
    if entry.previous_sha256 != previous:
        raise AuditBroken(number, "does not follow the entry before it")
    if entry.sha256 != entry.digest():
        raise AuditBroken(number, "was changed after it was written")
