"""One run on this device: train, encode, upload, open, apply.

The update's way out is `invited` → `cohort`; the sum's way in is `result`. Every step may be asked
for twice (a lost answer, a reconnection) and then answers again without doing the work again.
Steps raise Refused; the session tells the coordinator.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import structlog
from google.protobuf.duration_pb2 import Duration

from edge_agent.checkpoints import Checkpoint, discard_checkpoint
from edge_agent.engine import Engine, LocalUpdate
from edge_agent.global_state import GlobalState
from edge_agent.identity import Identity
from edge_agent.invitations import (
    Outcome,
    Terms,
    forget_invitation,
    keep_invitation,
    kept_invitation,
    read_outcome,
    read_terms,
)
from edge_agent.masking import Masking
from edge_agent.protection import Place, UpdateProtection
from edge_agent.run_keys import count_refused_sum, open_envelope, require_fresh_key
from edge_agent.transfer import Transfer
from fedloom.adapters import Theta
from fedloom.artifacts import ArtifactReference, reference_of
from fedloom.errors import Reason, Refused, refused_from_details
from fedloom.plans import Plan
from fedloom.strategies import algorithm
from fedloom.terms import Protection, weight_class
from fedloom.v1 import artifact_pb2, control_pb2

EngineFactory = Callable[[Path, Plan], Engine]  # (plan folder, plan)
Exporter = Callable[[Path, Plan, Theta, Path], None]  # (plan folder, plan, theta, new folder)
Send = Callable[[control_pb2.ConnectRequest], None]
_log = structlog.get_logger()
_T = TypeVar("_T")


class Interrupted(Exception):
    """The round went on without this device's update."""


@dataclass(frozen=True)
class Device:
    """What a run needs from the device that it happens on."""

    home: Path
    identity: Identity
    minimum_protection: Protection
    engine: EngineFactory
    export: Exporter


class Participation:
    """This device's part in one run."""

    def __init__(self, device: Device, transfer: Transfer, send: Send, run_id: bytes) -> None:
        self._device = device
        self._transfer = transfer
        self._send = send
        self.run_id = run_id
        self._folder = device.home / "runs" / run_id.hex()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._terms: Terms | None = None
        self._plan: Plan | None = None
        self._engine: Engine | None = None
        self._state: GlobalState | None = None
        self._protection: UpdateProtection | None = None
        self._trained: tuple[int, LocalUpdate, float] | None = None  # (round, update, seconds)
        self._encoded: tuple[int, int, ArtifactReference] | None = None  # (round, attempt, bytes)
        self._masking: Masking | None = None
        self._cohort: control_pb2.Cohort | None = None  # the open one, under masks
        self._interrupted = False
        self.progress = 0.0  # of the training in hand, 0..1
        self._log = _log.bind(run=run_id.hex()[:8])

    @property
    def round(self) -> int:
        """The round that this device was invited to last; 0 before the first."""
        return 0 if self._terms is None else self._terms.round

    def forget_state(self) -> None:
        """Go back to the plan's adapter; the next invitation's history is applied from there."""
        if self._state is not None:
            self._state.reset(self.plan_folder)
        self._trained = None

    def interrupt(self) -> None:
        """Stop the training in hand: the run goes on without it."""
        self._interrupted = True

    # the way out

    async def invited(self, message: control_pb2.Invitation) -> None:
        """Bring the state up to date, train, and say READY."""
        terms = await self._take_up(message)
        keep_invitation(self._folder, message)
        if self._trained is None or self._trained[0] != terms.round:
            await self._train(terms)
        _, update, seconds = _present(self._trained)
        ready = control_pb2.Ready(
            run_id=terms.run_id,
            round=terms.round,
            weight_class=weight_class(update.samples),
            training_loss=update.mean_loss,
            training_time=Duration(seconds=int(seconds)),
        )
        if self._masking is not None:
            ready.advertisement = self._masking.advertise(terms.round, terms.attempt)
            ready.identity.CopyFrom(self._device.identity.advertised_identity_key())
        self._send(control_pb2.ConnectRequest(ready=ready))

    async def _take_up(self, message: control_pb2.Invitation) -> Terms:
        terms = read_terms(message)
        self._check_policy(terms)
        await self._prepare(terms, message)
        for outcome in message.history:
            await self._apply(read_outcome(outcome))
        return terms

    async def _resume(self) -> None:
        """Go on from where a former process of this device left the run, if one took part."""
        if self._state is None and (message := kept_invitation(self._folder)) is not None:
            await self._take_up(message)

    def _check_policy(self, terms: Terms) -> None:
        minimum = self._device.minimum_protection
        if terms.encoding.protection < minimum:
            raise Refused(
                Reason.PROTECTION_TOO_WEAK,
                f"expected at least {minimum.name}, found {terms.encoding.protection.name}: "
                "policy.minimum_protection in agent.toml decides",
            )

    async def _prepare(self, terms: Terms, message: control_pb2.Invitation) -> None:
        """Have the plan, the engine, the key and the state of this run at hand."""
        if self._terms is not None and self._terms.plan != terms.plan:
            raise Refused(Reason.PLAN_MISMATCH, "expected one plan for the whole run")
        self._terms = terms
        if self._plan is None or self._engine is None:
            await self._take_up_plan(terms)
        require_fresh_key(self._folder)
        run_key = None
        if terms.encoding.protection.has_masks and self._masking is None:
            self._masking = Masking(self._folder, self._device.identity, terms.run_id)
        if terms.encoding.protection.has_run_key:
            if not message.HasField("envelope"):
                raise Refused(Reason.KEY_UNAVAILABLE, "expected the run key with the invitation")
            run_key = open_envelope(self._device.identity, terms.run_id, message.envelope)
        parameters = _present(self._plan).parameter_count
        self._protection = UpdateProtection(terms, parameters, run_key)

    async def _take_up_plan(self, terms: Terms) -> None:
        folder = self.plan_folder
        plan = await self._transfer.download_plan(terms.plan, folder)
        self._log.info("plan ready", plan=plan.name, parameters=plan.parameter_count)
        self._engine = await asyncio.to_thread(self._device.engine, folder, plan)
        self._state = GlobalState(self._folder, plan, folder, algorithm(terms.training))
        self._plan = plan

    @property
    def plan_folder(self) -> Path:
        """Where the run's plan lies on this device."""
        return self._device.home / "plans" / _present(self._terms).plan.sha256.hex()

    async def _train(self, terms: Terms) -> None:
        engine, state = _present(self._engine), _present(self._state)
        if state.rounds != terms.round - 1:
            raise Refused(
                Reason.STATE_DIVERGED,
                f"expected {terms.round - 1} rounds in the history, found {state.rounds}",
            )
        self._interrupted, self.progress = False, 0.0
        self._log.info("training", round=terms.round)
        checkpoint = Checkpoint(self._folder, terms.run_id, terms.round)
        order_seed = self._order_seed(terms)
        try:
            update = await asyncio.to_thread(
                engine.train, state.theta, terms.training, order_seed, self._heed, checkpoint
            )
        except Interrupted:
            checkpoint.discard()
            raise
        seconds = checkpoint.seconds
        if not math.isfinite(update.mean_loss):
            raise Refused(
                Reason.TRAINING_FAILED, f"expected a finite loss, found {update.mean_loss}"
            )
        self._trained = (terms.round, update, seconds)
        self._log.info(
            "trained",
            round=terms.round,
            samples=update.samples,
            loss=round(update.mean_loss, 4),
            seconds=round(seconds, 1),
        )

    def _heed(self, share: float) -> None:
        """Called by the engine, in its thread, after every step."""
        self.progress = share
        if self._interrupted:
            raise Interrupted

    def _order_seed(self, terms: Terms) -> int:
        name = self._device.identity.agent_id
        text = f"{terms.training.seed}/{terms.run_id.hex()}/{terms.round}/{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    async def cohort(self, message: control_pb2.Cohort) -> None:
        """Encode the update for this cohort and upload it; under masks deal shares first."""
        await self._resume()
        if self._masking is not None:
            self._cohort = message
            self._send_mask_step(self._masking.take_up(message))
            return
        terms = _present(self._terms)
        if self._trained is None or not self._trained[0] == message.round == terms.round:
            raise Refused(Reason.WRONG_ROUND, f"expected a cohort of round {terms.round}")
        members = list(message.members)
        if members.count(self._device.identity.agent_id) != 1:
            raise Refused(Reason.NOT_IN_COHORT, "expected this agent once among the members")
        await self._upload(message, Place(members.index(self._device.identity.agent_id)))

    async def mask_step(self, message: control_pb2.MaskStep) -> None:
        """Follow a message of the cohort's protocol: shares, the accepted list, its certificate."""
        await self._resume()
        masking = _present(self._masking)
        answer = masking.heard(message.message)
        if answer is not None:
            self._send_mask_step(answer)
        elif self._cohort is not None and masking.has_shares:
            await self._upload_masked(self._cohort, masking)

    async def _upload_masked(self, cohort: control_pb2.Cohort, masking: Masking) -> None:
        """Commit to one encoding under this attempt's masks, then send it; once, or again."""
        place = Place(masking.slot, masking.digest)
        if not masking.upload_sha256:
            if self._trained is None:  # a former process trained it: its checkpoint has the update
                await self._train(_present(self._terms))
            masked = replace(place, masks=masking.masks())
            masking.fix_upload((await self._encode(cohort, masked)).sha256)
        elif self._encoded is None:  # fixed by a former process: those very bytes, or none
            path = self._folder / "update.bin"
            kept = await asyncio.to_thread(reference_of, path)
            if kept is None or kept.sha256 != masking.upload_sha256:
                raise Refused(Reason.WRONG_ROUND, "expected the update that was fixed, found none")
            self._encoded = (cohort.round, cohort.attempt, kept)
        await self._upload(cohort, place)

    def _send_mask_step(self, message: bytes) -> None:
        step = control_pb2.MaskStep(run_id=self.run_id, round=self.round, message=message)
        self._send(control_pb2.ConnectRequest(mask_step=step))

    async def _encode(self, cohort: control_pb2.Cohort, place: Place) -> ArtifactReference:
        """Encode once for each cohort: a repeated one gets the same bytes, the upload resumes."""
        if self._encoded is None or self._encoded[:2] != (cohort.round, cohort.attempt):
            reference = await asyncio.to_thread(
                _present(self._protection).write_update,
                _present(self._trained)[1],
                place,
                cohort.attempt,
                cohort.weight_cap,
                self._folder / "update.bin",
            )
            self._encoded = (cohort.round, cohort.attempt, reference)
        return self._encoded[2]

    async def _upload(self, message: control_pb2.Cohort, place: Place) -> None:
        terms = _present(self._terms)
        reference = await self._encode(message, place)
        header = artifact_pb2.UploadHeader(
            run_id=terms.run_id,
            round=message.round,
            attempt=message.attempt,
            size_bytes=reference.size_bytes,
            sha256=reference.sha256,
        )
        try:
            await self._transfer.upload(header, self._folder / "update.bin")
        except Refused as refused:
            if refused.reason is Reason.WRONG_ROUND:  # too late: nothing that we must decline
                raise Interrupted from refused
            raise
        self._log.info("uploaded", round=message.round, bytes=reference.size_bytes)

    def accepted(self, message: control_pb2.Accepted) -> None:
        """Check that our own upload stands in the accepted list as we sent it, if at all."""
        if self._encoded is None or self._encoded[:2] != (message.round, message.attempt):
            return
        if self._encoded[2].sha256 not in [update.sha256 for update in message.updates]:
            self._log.warning("our update is not in the sum", round=message.round)

    # the way in

    async def result(self, message: control_pb2.Result) -> None:
        """Fetch, open and apply the round's sum, and report the state's digest and quality."""
        outcome = read_outcome(message.outcome)
        await self._resume()
        if outcome.round > _present(self._state).rounds + 1:
            raise Refused(Reason.WRONG_ROUND, "expected the result of the next round")
        saturated = await self._apply(outcome)
        self._trained = None
        discard_checkpoint(self._folder)
        evaluation = await asyncio.to_thread(
            _present(self._engine).evaluate, _present(self._state).theta
        )
        applied = control_pb2.Applied(
            run_id=self.run_id,
            round=outcome.round,
            state_sha256=_present(self._state).sha256,
            saturated=saturated,
        )
        if evaluation is not None:
            applied.evaluation.count = evaluation.count
            applied.evaluation.correct = evaluation.correct
            applied.evaluation.loss = evaluation.mean_loss
            self._log.info(
                "evaluated",
                round=outcome.round,
                accuracy=round(evaluation.correct / evaluation.count, 4),
            )
        self._send(control_pb2.ConnectRequest(applied=applied))

    async def finished(self, message: control_pb2.Finished) -> None:
        """Keep the run's model: versions in `models/`, the newest named in `models/current`."""
        if message.outcome == control_pb2.RUN_OUTCOME_COMPLETED:
            await self._export(message)
        else:
            self._log.warning("run failed", reason=str(refused_from_details(message.reason)))
        forget_invitation(self._folder)
        discard_checkpoint(self._folder)

    async def _export(self, message: control_pb2.Finished) -> None:
        await self._resume()
        if self._state is None:
            self._log.warning("run completed without this device")
            return
        for outcome in message.history:
            await self._apply(read_outcome(outcome))
        folder = self._device.home / "models" / self.run_id.hex()
        plan, theta = _present(self._plan), self._state.theta
        await asyncio.to_thread(self._device.export, self.plan_folder, plan, theta, folder)
        (folder.parent / "current").write_text(folder.name + "\n")
        self._log.info("model exported", folder=str(folder))

    async def _apply(self, outcome: Outcome) -> int:
        """Apply a round unless the state includes it; return the saturated values in its sum."""
        state = _present(self._state)
        if outcome.round <= state.rounds:
            return 0
        if outcome.round != state.rounds + 1:
            raise Refused(
                Reason.STATE_DIVERGED,
                f"expected round {state.rounds + 1} next, found {outcome.round}",
            )
        path = self._folder / f"sum-{outcome.round}.bin"
        await self._transfer.download(outcome.sum, path)
        try:
            opened = await asyncio.to_thread(_present(self._protection).open_sum, outcome, path)
        except Refused as refused:
            if refused.reason is Reason.SUM_NOT_VERIFIED:
                count_refused_sum(self._folder)
            raise
        await asyncio.to_thread(state.apply, opened.mean)
        path.unlink()
        self._log.info("applied", round=outcome.round, updates=opened.count)
        return opened.saturated


def _present(value: _T | None) -> _T:
    if value is None:
        raise Refused(Reason.WRONG_ROUND, "expected an invitation to this run first")
    return value
