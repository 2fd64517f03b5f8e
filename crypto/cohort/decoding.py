"""Foreign bytes to messages: `messages` says what each field is. Nothing is a length but a count.

A count is compared with the bytes that are left before anything is made of it.
"""

from collections.abc import Callable

from ..errors import MalformedMessage
from .identity import SIGNATURE_SIZE
from .messages import (
    BOX_SIZE,
    DIGEST_SIZE,
    KEY_SIZE,
    MAGIC,
    START,
    VERSION,
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
from .quorum import SECRET_SIZE
from .shamir import SHARE_SIZE, check_share


class Fields:
    """Takes fixed fields off the front of foreign bytes; the end must be the end."""

    def __init__(self, encoded: bytes) -> None:
        self._rest = memoryview(encoded)

    def take(self, size: int) -> bytes:
        """Return the next bytes; raises MalformedMessage where there are fewer."""
        if len(self._rest) < size:
            raise MalformedMessage("bytes left", size, len(self._rest))
        taken, self._rest = self._rest[:size], self._rest[size:]
        return bytes(taken)

    def number(self, size: int) -> int:
        """Return the next unsigned integer."""
        return int.from_bytes(self.take(size), "little")

    def rows(self, count: int, size: int) -> tuple[bytes, ...]:
        """Return so many rows; nothing is allocated before there is room for all of them."""
        if len(self._rest) < count * size:
            raise MalformedMessage("bytes left", count * size, len(self._rest))
        return tuple(self.take(size) for _ in range(count))

    def sized(self) -> bytes:
        """Return bytes behind their u32 length."""
        return self.take(self.number(4))

    @property
    def done(self) -> bool:
        """Whether everything was taken."""
        return not self._rest

    def end(self) -> None:
        """Refuse anything behind the last field."""
        if self._rest:
            raise MalformedMessage("bytes after the message", 0, len(self._rest))


def decode(encoded: bytes) -> Message:
    """Read a message; raises MalformedMessage for anything that `encode` does not write."""
    fields = Fields(encoded)
    magic, version, kind, *attempt = START.unpack(fields.take(START.size))
    if (magic, version) != (MAGIC, VERSION) or kind not in _READERS:
        raise MalformedMessage("magic, version, kind", "those of a message", "others")
    message = _READERS[kind](fields, AttemptId(*attempt))
    fields.end()
    return message


def _advertisement(fields: Fields, attempt: AttemptId) -> Advertisement:
    encoded = fields.take(fields.number(1))
    try:
        name = encoded.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessage("agent id", "UTF-8", "other bytes") from error
    if not name:
        raise MalformedMessage("agent id", "1 .. 255 bytes", "none")
    keys = fields.rows(3, KEY_SIZE)
    return Advertisement(attempt, name, keys[0], keys[1], keys[2], fields.take(SIGNATURE_SIZE))


def _cohort(fields: Fields, attempt: AttemptId, groups: int = 1) -> Cohort:
    minimum, count = fields.number(2), fields.number(2)
    members = tuple(_advertisement(fields, attempt) for _ in range(count))
    return Cohort(attempt, minimum, members, groups)


def _grouped_cohort(fields: Fields, attempt: AttemptId) -> Cohort:
    if (groups := fields.number(2)) < 2:
        raise MalformedMessage("groups", "2 or more", groups)
    return _cohort(fields, attempt, groups)


def _boxes(fields: Fields, attempt: AttemptId) -> Boxes:
    slot, count = fields.number(2), fields.number(2)
    return Boxes(attempt, slot, fields.rows(count, BOX_SIZE))


def _acceptance(fields: Fields, attempt: AttemptId) -> Acceptance:
    cohort, count = fields.take(DIGEST_SIZE), fields.number(2)
    return Acceptance(attempt, cohort, _slotted(fields.rows(count, 2 + DIGEST_SIZE)))


def _endorsement(fields: Fields, attempt: AttemptId) -> Endorsement:
    return Endorsement(attempt, fields.number(2), fields.take(SIGNATURE_SIZE))


def _certificate(fields: Fields, attempt: AttemptId) -> Certificate:
    acceptance, count = fields.take(DIGEST_SIZE), fields.number(2)
    return Certificate(attempt, acceptance, _slotted(fields.rows(count, 2 + SIGNATURE_SIZE)))


def _release(fields: Fields, attempt: AttemptId) -> Release:
    slot, seed, count = fields.number(2), fields.take(SECRET_SIZE), fields.number(2)
    shares = fields.rows(count, SHARE_SIZE)
    for share in shares:
        check_share(share)
    return Release(attempt, slot, seed, shares)


def _slotted(rows: tuple[bytes, ...]) -> tuple[tuple[int, bytes], ...]:
    return tuple((int.from_bytes(row[:2], "little"), row[2:]) for row in rows)


_READERS: dict[int, Callable[[Fields, AttemptId], Message]] = {
    1: _advertisement,
    2: _cohort,
    3: _boxes,
    4: _acceptance,
    5: _endorsement,
    6: _certificate,
    7: _release,
    8: _grouped_cohort,
}
