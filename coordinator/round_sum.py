"""The sum of one attempt: updates go in as they arrive, each whole or not at all."""

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import structlog

import crypto
from coordinator.aggregation import MEAN, Aggregation
from coordinator.strategies.factored_total import FactoredTotal, FactorRound
from crypto import groups
from crypto.masks import Correction
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.strategies.fedma import Layer
from fedloom.terms import Protection

_log = structlog.get_logger()


class UploadKind(Enum):
    """What an agent sends."""

    UPDATE = "update"
    OPENED_SUM = "opened sum"


@dataclass(frozen=True)
class Upload:
    """One update, or opened sum, as its sender announces it."""

    agent: str
    run_id: bytes
    round: int
    attempt: int
    artifact: ArtifactReference
    kind: UploadKind = UploadKind.UPDATE


_REASONS: dict[type[crypto.CryptoError], Reason] = {
    crypto.NotFinite: Reason.NOT_FINITE,
    crypto.WeightOutOfRange: Reason.WEIGHT_OUT_OF_RANGE,
    crypto.WrongContext: Reason.WRONG_ROUND,
    crypto.PeerFault: Reason.MALFORMED,
}


def refused_by_crypto(error: crypto.CryptoError) -> Refused:
    """Return the refusal for foreign bytes; a fault of ours is not the peer's and is raised."""
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return Refused(reason, str(error))
    raise error


def load_protection(protection: Protection) -> None:
    """Import what adding needs; blocks for 25 ms, from a cold disk for more."""
    crypto.protection(_NAMES[protection])


class RoundSum:
    """Spools, validates and adds updates; memory: one accumulator, however many agents.

    What was added stays in the spool until `discard`: a coordinator that is killed adds it again,
    and so does one that lost a worker process with its part of the sum.
    """

    def __init__(
        self,
        context: crypto.UpdateContext,
        protection: Protection,
        members: tuple[str, ...],
        spool: Path,
        processes: int = 1,
        aggregation: Aggregation = MEAN,
        layers: Sequence[Layer] = (),
        factors: FactorRound | None = None,
    ) -> None:
        """`layers` are those whose neurons are matched (`fedloom.strategies.fedma`), if any."""
        self.context = context
        self.adding: str | None = None  # the agent whose update is on its way into the sum
        self._members = members
        self._new_sum = partial(crypto.protection(_NAMES[protection]).accumulator, context)
        self._new_total: Callable[[int], crypto.Accumulator] = self._new_sum
        if layers:
            self._new_total = partial(self._matched_total, layers)
        elif aggregation.groups > 1:
            self._new_total = partial(self._grouped_total, aggregation.groups)
        elif not aggregation.is_mean:
            self._new_total = partial(self._robust_total, aggregation)
        if factors is not None:
            self._new_total = partial(self._factored_total, factors)
        self._accepted: dict[str, bytes] = {}
        self._accumulator = self._new_total(processes)
        self._announced: dict[int, Path] = {}  # by slot
        self._spool = spool
        spool.mkdir(parents=True, exist_ok=True)

    def _grouped_total(self, count: int, processes: int) -> crypto.Accumulator:
        """Return a total for each group; an update is added to one of them, in this process.

        Who masks with whom the members must know, so that their cohort draws the groups; elsewhere
        the coordinator does, from who takes part: no agent knows that before it is in the cohort.
        """
        del processes
        drawn = groups.draw(self.context.cohort or self._seed(), len(self._members), count)
        return groups.GroupedTotal(drawn, partial(self._new_sum, 1))

    def _seed(self) -> bytes:
        c = self.context
        told = [c.run_id.hex(), str(c.round), str(c.attempt), *self._members]
        return hashlib.sha256("\0".join(told).encode()).digest()

    def _robust_total(self, aggregation: Aggregation, processes: int) -> crypto.Accumulator:
        """Return a total that reads the spool at the end; it makes no use of processes."""
        from coordinator.strategies.robust.total import RobustTotal

        del processes
        return RobustTotal(self.context, aggregation, self._accepted_path)

    def _matched_total(self, layers: Sequence[Layer], processes: int) -> crypto.Accumulator:
        """Return a total that matches what is in the spool at the end; no use of processes."""
        from coordinator.strategies.matching import MatchedTotal

        del processes
        return MatchedTotal(self.context, layers, self._accepted_path)

    def _factored_total(self, factors: FactorRound, processes: int) -> crypto.Accumulator:
        del processes
        return FactoredTotal(self.context, factors, self._accepted_path)

    def _accepted_path(self, slot: int) -> Path:
        return self._path(slot, self._accepted[self._members[slot]])

    def path_for(self, upload: Upload) -> Path | None:
        """Return where the update is spooled; None when it is in the sum already."""
        context = self.context
        if (upload.run_id, upload.round, upload.attempt) != (
            context.run_id,
            context.round,
            context.attempt,
        ):
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected round {context.round}, attempt {context.attempt}, "
                f"found {upload.round}, {upload.attempt}",
            )
        if upload.agent not in self._members:
            raise Refused(Reason.NOT_IN_COHORT, f"expected one of {len(self._members)} members")
        expected = self._accumulator.encoded_update_size
        if upload.artifact.size_bytes != expected:
            larger = upload.artifact.size_bytes > expected
            raise Refused(
                Reason.TOO_LARGE if larger else Reason.MALFORMED,
                f"expected an update of {expected} bytes, found {upload.artifact.size_bytes}",
            )
        if (accepted := self._accepted.get(upload.agent)) is not None:
            if accepted == upload.artifact.sha256:
                return None
            raise Refused(Reason.WRONG_ROUND, "another update of this agent is in the sum")
        return self._spooled(self._members.index(upload.agent), upload.artifact)

    def _spooled(self, slot: int, artifact: ArtifactReference) -> Path:
        """One file for each member: announcing another update forgets the one begun before."""
        path = self._path(slot, artifact.sha256)
        other = self._announced.get(slot, path)
        if other != path:
            other.unlink(missing_ok=True)
            other.with_suffix(".part").unlink(missing_ok=True)
        self._announced[slot] = path
        return path

    def _path(self, slot: int, sha256: bytes) -> Path:
        return self._spool / f"{slot}.{sha256.hex()}.update"

    async def add(self, upload: Upload, path: Path) -> None:
        """Add the spooled update, alone; raises Refused and adds nothing."""
        self.adding = upload.agent
        try:
            await asyncio.to_thread(self._add, self._members.index(upload.agent), path)
        except crypto.CryptoError as error:
            raise refused_by_crypto(error) from error
        finally:
            self.adding = None
        self._accepted[upload.agent] = upload.artifact.sha256

    async def restore(self, agent: str, sha256: bytes) -> None:
        """Add a spooled update that was accepted before a restart; raises OSError or Refused."""
        path = self._path(self._members.index(agent), sha256)
        artifact = ArtifactReference(sha256, (await asyncio.to_thread(path.stat)).st_size)
        c = self.context
        await self.add(Upload(agent, c.run_id, c.round, c.attempt, artifact), path)

    def _add(self, slot: int, path: Path) -> None:
        try:
            self._add_file(slot, path)
        except crypto.SpoiledTotal:
            self.rebuild()
            self._add_file(slot, path)

    def _add_file(self, slot: int, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            self._accumulator.add(slot, file)

    def rebuild(self) -> None:
        """Add everything again that is in the sum; raises OSError when the spool lacks some of it.

        In this process: whatever ended a worker, the memory or somebody, would end the next one.
        """
        _log.warning("sum is built again from the spool", updates=len(self._accepted))
        self._accumulator = self._new_total(1)
        for slot in self.slots:
            self._add_file(slot, self._accepted_path(slot))

    @property
    def slots(self) -> tuple[int, ...]:
        """The members in the sum, ascending."""
        return tuple(s for s, agent in enumerate(self._members) if agent in self._accepted)

    def encoded(self, correction: Correction | None = None) -> Iterator[bytes]:
        """Yield the encoded sum, without the masks left in it; nothing is added any more."""
        return self._accumulator.result(correction)

    def discard(self) -> None:
        """Delete what is spooled."""
        shutil.rmtree(self._spool, ignore_errors=True)


_NAMES: dict[Protection, crypto.ProtectionName] = {
    Protection.PLAIN: "plain",
    Protection.MASKED: "masked",
    Protection.ENCRYPTED: "encrypted",
    Protection.SEALED: "sealed",
}
