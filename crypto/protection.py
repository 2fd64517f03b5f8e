"""The shape that every protection has, so that the product has one pipeline.

    device                      coordinator                     device
    encoder(...).encode(x, w) → accumulator(...).add(member, …)
                                accumulator.result()          → open_sum(...)

A protection is a module with these three functions; both halves of what it does to an update lie in
that one file. Uploads and sums are read from seekable binary files (a spooled file, BytesIO), so
that a whole one is never in memory, and can be validated before anything is changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidContext
from .masks import Correction, Mask
from .parameters import UpdateContext
from .run_key import RunKey
from .wire import Source

ProtectionName = Literal["plain", "masked", "encrypted", "sealed"]


@dataclass(frozen=True)
class OpenedSum:
    """What a device learns from a sum, and all that it learns."""

    mean: NDArray[np.float32]  # (P,), Σ(weight · update) / Σ weight
    total_weight: int
    saturated: int  # values beyond ±clip, over all members; 0 in protection `plain`
    count: int  # updates in the sum
    exponents: tuple[int, ...] = ()  # histogram for `exponents.next_clip`; empty in `plain`


class Encoder(Protocol):
    """The device half before the coordinator: one member's updates of one attempt."""

    @property
    def encoded_size(self) -> int:
        """Bytes that `encode` will yield, exactly."""

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        """Encode (P,) finite float32, chunk by chunk, at constant memory.

        Raises InvalidUpdate, NotFinite or WeightOutOfRange at the call, before the first chunk.
        The update must not change until the iterator is exhausted.
        """


class Accumulator(Protocol):
    """The coordinator half: it never holds a key. One thread at a time."""

    @property
    def encoded_sum_size(self) -> int:
        """Bytes that `result` will yield, exactly."""

    @property
    def encoded_update_size(self) -> int:
        """Bytes of an upload that `add` accepts, exactly: to be refused earlier than here."""

    @property
    def members(self) -> tuple[int, ...]:
        """The slots whose updates are in the sum, in ascending order."""

    def add(self, member: int, source: Source) -> None:
        """Add a member's whole update, or raise and change nothing.

        The file is the update from its first byte to its last. It is read twice and must not
        change in between: if it does, the total is spoiled and every later call says so.
        """

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        """Encode the sum, chunk by chunk; add nothing before the iterator is exhausted.

        `masked` and `sealed` need the correction that `cohort.relay` recovers, the others refuse
        one. Raises EmptyTotal or SpoiledTotal at the call.
        """


class Protection(Protocol):
    """A module that protects updates: `plain`, `masked`, `encrypted`, `sealed`.

    `processes`: 1 works in the caller's thread, N in N processes, 0 in one for each core. What
    comes out is the same. Steps that cost less than copying chunks to a process stay here: all
    of `plain`, and of `masked` all but the encoder.
    """

    def encoder(
        self,
        context: UpdateContext,
        member: int,
        run_key: RunKey | None,
        rng: np.random.Generator,
        masks: Sequence[Mask] | None = None,
        processes: int = 1,
    ) -> Encoder:
        """Make the encoder of one member; `rng` only rounds, nothing secret depends on it.

        `masked` and `sealed` need the masks that `cohort.member` gives, the others refuse them.
        """

    def accumulator(self, context: UpdateContext, processes: int = 1) -> Accumulator:
        """Make an empty total."""

    def open_sum(
        self,
        context: UpdateContext,
        run_key: RunKey | None,
        members: Sequence[int],
        source: Source,
        processes: int = 1,
    ) -> OpenedSum:
        """Open the sum of exactly these members' updates."""


def protection(name: ProtectionName) -> Protection:
    """Return a protection by the name that a run gives it.

    Raises InvalidContext for another name, BackendMissing where TenSEAL is needed and absent;
    `plain` and `masked` never import it.
    """
    match name:
        case "plain":
            from . import plain

            return plain
        case "encrypted":
            from . import encrypted

            return encrypted
        case "masked":
            from . import masked

            return masked
        case "sealed":
            from . import sealed

            return sealed
        case _:
            raise InvalidContext("protection", "plain, masked, encrypted or sealed", name)
