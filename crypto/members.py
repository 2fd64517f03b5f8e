"""Whose updates are in a total: each once, no more than stay exact, all of each; and masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import (
    CapacityExceeded,
    CryptoError,
    DuplicateMember,
    EmptyTotal,
    InvalidContext,
    MissingKey,
    SpoiledTotal,
    WrongContext,
)
from .masks import Correction, Mask
from .parameters import UpdateContext


class SummedMembers:
    """The members of one total, and whether the total is whole."""

    def __init__(self, context: UpdateContext) -> None:
        self._capacity = context.capacity
        self._members: set[int] = set()
        self._spoiled = False

    def __len__(self) -> int:
        return len(self._members)

    def ascending(self) -> tuple[int, ...]:
        """Return the members' slots in ascending order."""
        return tuple(sorted(self._members))

    def check_admissible(self, member: int) -> None:
        """Refuse a member that is in the total already, or one too many."""
        self._check_whole()
        if member in self._members:
            raise DuplicateMember("member", "not yet in the sum", member)
        if len(self._members) >= self._capacity:
            raise CapacityExceeded(
                "updates in the sum", f"at most {self._capacity}", len(self._members) + 1
            )

    def check_summed(self, correction: Correction | None, *, masked: bool) -> None:
        """Refuse to publish a total of nothing, of half an update, or with the masks left in."""
        self._check_whole()
        if not self._members:
            raise EmptyTotal("updates in the sum", "at least 1", 0)
        if masked != (correction is not None):
            wanted = ("one", "none") if masked else ("none", "one")
            raise InvalidContext("correction of the masks", *wanted)

    @contextmanager
    def adding(self, member: int) -> Iterator[None]:
        """Surround the addition of a validated update: left by any error, the total is spoiled."""
        self._spoiled = True
        try:
            yield
        except (CryptoError, OSError) as error:
            raise SpoiledTotal("upload", "readable twice", "changed or unreadable") from error
        self._members.add(member)
        self._spoiled = False

    def _check_whole(self) -> None:
        if self._spoiled:
            raise SpoiledTotal("total", "whole", "half an update in it")


def check_members(members: tuple[int, ...], context: UpdateContext) -> None:
    """Refuse a list of members that no sum of this context can have."""
    if not 1 <= len(members) <= context.capacity:
        raise CapacityExceeded("members of the sum", f"1 .. {context.capacity}", len(members))
    if len(set(members)) != len(members):
        raise WrongContext("members of the sum", "each of them once", members)


def require_masks(masks: Sequence[Mask] | None) -> tuple[Mask, ...]:
    """Return the masks; there must be one at least, which is the member's own."""
    if not masks:
        raise MissingKey("masks of the member", "its own at least", "none")
    return tuple(masks)


def refuse_masks(masks: Sequence[Mask] | None) -> None:
    """Refuse masks where nobody would take them out again."""
    if masks is not None:
        raise MissingKey("masks of the member", "none", "some")
