"""The way out: this device's update, encoded for each cohort and uploaded; masked in its steps.

Everything may be asked for twice: the same cohort gets the same bytes, and the upload resumes.
"""

import asyncio
from dataclasses import replace

from edge_agent.invitations import Cohort, read_cohort
from edge_agent.local_memory import SumPlace
from edge_agent.local_rules import Outgoing
from edge_agent.masking import Masking
from edge_agent.protection import Place
from edge_agent.status import Step
from edge_agent.undertaking import Surroundings, Undertaking
from fedloom.artifacts import ArtifactReference, reference_of
from fedloom.errors import Reason, Refused
from fedloom.terms import MINIMUM_SUM
from fedloom.v1 import artifact_pb2, control_pb2

_UPDATE_FILE = "update.bin"


class Contribution:
    """What this device gives to the sums of one run."""

    def __init__(self, here: Surroundings) -> None:
        self._here = here
        self._path = here.folder / _UPDATE_FILE
        self._encoded: tuple[int, int, ArtifactReference] | None = None  # (round, attempt, bytes)
        self._cohort: Cohort | None = None  # the open one, under masks

    async def give(
        self, run: Undertaking, message: control_pb2.Cohort, update: Outgoing | None
    ) -> None:
        """Encode the update for this cohort and upload it; under masks deal shares first.

        `update` is that of the cohort's round; None is for the case that its bytes are fixed.
        """
        cohort = read_cohort(message)
        self._check(run, cohort, update)
        if run.masking is not None:
            boxes = await run.masking.take_up(message)
            self._cohort = cohort
            self._send_mask_step(cohort.round, boxes)
            return
        place = Place(cohort.members.index(self._here.agent_id))
        await self._upload(cohort, await self._encode(run, cohort, place, update))

    def _check(self, run: Undertaking, cohort: Cohort, update: Outgoing | None) -> None:
        fixed = run.masking is not None and run.masking.upload_sha256
        if cohort.round != run.terms.round or (update is None and not fixed):
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected a cohort of round {run.terms.round}, with this device's update trained",
            )
        if run.masking is None and cohort.members.count(self._here.agent_id) != 1:
            raise Refused(Reason.NOT_IN_COHORT, "expected this agent once among the members")
        least, found = MINIMUM_SUM * run.terms.training.groups, len(cohort.members)
        if found < least and run.masking is None:
            raise Refused(
                Reason.COHORT_REFUSED,
                f"expected {least} members, {MINIMUM_SUM} in each group, found {found}",
            )
        clip = run.clip(cohort.weight_cap)
        if cohort.clip != clip:
            raise Refused(Reason.MALFORMED, f"expected clip {clip!r}, found {cohort.clip!r}")

    async def mask_step(
        self, run: Undertaking, message: control_pb2.MaskStep, update: Outgoing | None
    ) -> None:
        """Follow a message of the cohort's protocol: shares, the accepted list, its certificate."""
        if (masking := run.masking) is None:
            raise Refused(Reason.WRONG_ROUND, "expected no mask step in a run without masks")
        answer = await masking.heard(message.message)
        if answer is not None:
            self._here.report(Step.VOUCHING, run.terms.round)
            self._send_mask_step(run.terms.round, answer)
        elif self._cohort is not None and masking.has_shares:
            await self._upload(self._cohort, await self._masked(run, self._cohort, masking, update))

    async def _masked(
        self, run: Undertaking, cohort: Cohort, masking: Masking, update: Outgoing | None
    ) -> ArtifactReference:
        """Commit to one encoding under this attempt's masks; return it once, or again."""
        if not masking.upload_sha256:
            place = Place(masking.slot, masking.digest)
            masked = replace(place, masks=await asyncio.to_thread(masking.masks))
            reference = await self._encode(run, cohort, masked, update)
            await masking.fix_upload(reference.sha256)
            return reference
        kept = None if self._encoded is None else self._encoded[2]
        if kept is None:  # fixed by a former process: those very bytes, or none
            kept = await asyncio.to_thread(reference_of, self._path)
        if kept is None or kept.sha256 != masking.upload_sha256:
            raise Refused(Reason.WRONG_ROUND, "expected the update that was fixed, found none")
        self._encoded = (cohort.round, cohort.attempt, kept)
        return kept

    async def _encode(
        self, run: Undertaking, cohort: Cohort, place: Place, update: Outgoing | None
    ) -> ArtifactReference:
        """Encode once for each cohort: a repeated one gets the same bytes, the upload resumes."""
        if self._encoded is None or self._encoded[:2] != (cohort.round, cohort.attempt):
            if update is None:
                raise Refused(Reason.WRONG_ROUND, "expected this device's update trained")
            # First: once the bytes are there they may come into a sum, whatever becomes of us.
            proposed = SumPlace(cohort.round, cohort.attempt, place.slot)
            await asyncio.to_thread(self._propose, run, proposed, update, cohort.clip)
            reference = await asyncio.to_thread(
                run.protection.write_update,
                update,
                place,
                cohort,
                run.key_to_encode(),
                self._path,
            )
            self._encoded = (cohort.round, cohort.attempt, reference)
        return self._encoded[2]

    def _propose(self, run: Undertaking, place: SumPlace, update: Outgoing, clip: float) -> None:
        run.memory.propose(place, update.remembered(run.protection.limit(clip)))
        if run.held is not None:
            run.held.propose(place)

    async def _upload(self, cohort: Cohort, update: ArtifactReference) -> None:
        self._here.report(Step.UPLOADING, cohort.round)
        kind = artifact_pb2.UPLOAD_KIND_UPDATE
        await self._here.upload(kind, (cohort.round, cohort.attempt), update, self._path)
        self._here.log.info("uploaded", round=cohort.round, bytes=update.size_bytes)
        self._here.report(Step.WAITING, cohort.round, "the others' updates are not all there")

    def _send_mask_step(self, round_number: int, message: bytes) -> None:
        step = control_pb2.MaskStep(run_id=self._here.run_id, round=round_number, message=message)
        self._here.send(control_pb2.ConnectRequest(mask_step=step))

    def accepted(self, message: control_pb2.Accepted) -> None:
        """Check that our own upload stands in the accepted list as we sent it, if at all."""
        if self._encoded is None or self._encoded[:2] != (message.round, message.attempt):
            return
        if self._encoded[2].sha256 not in [update.sha256 for update in message.updates]:
            self._here.log.warning("our update is not in the sum", round=message.round)

    def forget(self) -> None:
        """Drop what was encoded: the round is closed without it."""
        self._encoded = self._cohort = None
