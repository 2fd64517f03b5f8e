"""One run on this device: take it up, train, say READY; the way out and the way in around it.

The update's way out is `contribution`, the sum's way in `applied_rounds`. Every step may be asked
for twice (a lost answer, a reconnection) and then answers again without doing the work again.
Steps raise Refused; the session tells the coordinator.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from google.protobuf.duration_pb2 import Duration

from edge_agent.activation import keep_state
from edge_agent.applied_rounds import apply_round, forget_opened, return_sum
from edge_agent.availability import ALWAYS, Availability
from edge_agent.capability import keep_pace, pace_of
from edge_agent.checkpoints import has_checkpoint
from edge_agent.contribution import Contribution
from edge_agent.engine import Engine, Evaluation
from edge_agent.evaluations import Evaluations, told
from edge_agent.global_state import GlobalState
from edge_agent.held_updates import HeldUpdates
from edge_agent.identity import Identity
from edge_agent.invitations import (
    Terms,
    forget_invitation,
    is_asynchronous,
    keep_invitation,
    kept_invitation,
    read_outcome,
    read_terms,
)
from edge_agent.local_memory import LocalMemory, forget_memory
from edge_agent.local_rules import prunes_rank, remembered
from edge_agent.masking import Masking
from edge_agent.model_versions import ModelMaker
from edge_agent.protection import UpdateProtection
from edge_agent.resources import Resources
from edge_agent.run_keys import RunKeys
from edge_agent.status import StatusFile, Step
from edge_agent.training import Training
from edge_agent.transfer import Transfer
from edge_agent.undertaking import Send, Surroundings, Undertaking
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused, refused_from_details
from fedloom.plans import Plan
from fedloom.quality import Report, tail_length
from fedloom.strategies import moved_length, update_length
from fedloom.strategies.portions import keeps_own_model
from fedloom.terms import Protection, Release, weight_class
from fedloom.v1 import control_pb2

EngineFactory = Callable[[Path, Plan], Engine]  # (plan folder, plan)
_log = structlog.get_logger()


@dataclass(frozen=True)
class Device:
    """What a run needs from the device that it happens on."""

    home: Path
    identity: Identity
    minimum_protection: Protection
    engine: EngineFactory
    models: ModelMaker | None  # None: none are kept
    permitted_release: Release = Release.AGENTS
    crypto_processes: int = 1  # to encode and open in; 0: one for each core
    resources: Resources = field(default_factory=Resources)
    permitted_report: Report = Report.MEAN
    availability: Availability = ALWAYS
    engine_name: str = "onnx"
    tells_capability: bool = True
    rank: int = 0  # of adapters, where a run lets devices differ; 0: the plan's


class Participation:
    """This device's part in one run."""

    def __init__(
        self, device: Device, transfer: Transfer, send: Send, status: StatusFile, run_id: bytes
    ) -> None:
        self._device = device
        self._send = send
        self.run_id = run_id
        self._folder = device.home / "runs" / run_id.hex()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log = _log.bind(run=run_id.hex()[:8])
        self._here = Surroundings(
            run_id, self._folder, device.identity.agent_id, transfer, send, status, self._log
        )
        self._keys = RunKeys(self._folder, device.identity, run_id)
        self._contribution = Contribution(self._here)
        self._masking: Masking | None = None
        self._ground: tuple[Plan, Engine, GlobalState] | None = None  # what one plan led to
        self._run: Undertaking | None = None
        self._evaluations = Evaluations()
        self._training = Training(self._here, self._evaluations)
        self.round = 0  # that this device was invited to last
        self.newest_round = 0  # that it was told of

    @property
    def progress(self) -> float:
        """How much of the training in hand is done, 0..1."""
        return self._training.progress

    @property
    def trains_on(self) -> bool:
        """Whether a training is under way that the run waits for in no round."""
        asynchronous = self._run is not None and self._run.held is not None
        return asynchronous and self._training.is_under_way

    def forget_state(self) -> None:
        """Go back to the plan's adapter; the next invitation's history is applied from there."""
        self.drop_update()
        if self._ground is not None:
            _, _, state = self._ground
            state.reset()
        self._evaluations.forget()
        self._forget_update()

    def interrupt(self) -> None:
        """Stop the training in hand: the run goes on without it."""
        self._training.interrupt()

    def overtaken(self, message: control_pb2.ConnectResponse) -> None:
        """Stop training for a round: the run went on, or another has begun.

        An asynchronous run takes the update in a later round, unless it is too old by now.
        """
        invitation = message.invitation
        if invitation.run_id == self.run_id:
            self.newest_round = invitation.round
        run_id = invitation.run_id or message.result.run_id
        if self._run is None or self._run.held is None or run_id != self.run_id:
            self._training.overtaken()
        elif self.trains_on:
            last = self._run.state.last.round
            staleness = sum(outcome.round > last for outcome in invitation.history)
            if staleness > self._run.terms.training.max_staleness:
                self._training.overtaken()
            elif staleness:
                cause = f"the run is {staleness} rounds on, and takes the update in a later one"
                self._here.report(Step.TRAINING, self.round, cause)

    def drop_update(self) -> None:
        """Hold no update of an asynchronous run: the next one is made from the newest state."""
        if self._run is not None and self._run.held is not None:
            self._run.held.drop()
            self._training.forget()

    def round_closed(self, round_number: int) -> None:
        """Stop training for a round that was closed without this device, and drop its update."""
        if round_number == self.round:
            self._training.close(round_number)
            self._contribution.forget()

    def _forget_update(self) -> None:
        self._training.forget()
        self._contribution.forget()

    # an invitation

    async def invited(self, message: control_pb2.Invitation) -> None:
        """Bring the state up to date, train, and say READY."""
        self._training.begin()
        if self._run is None and is_asynchronous(message):
            await self._end_training(message.round)
        run = await self._take_up(message)
        terms = run.terms
        run.key_to_encode()  # or decline before anything is trained
        keep_invitation(self._folder, message)
        trained = await self._training.done(run)
        if trained.seconds:
            pace = pace_of(run.round_terms, trained.samples, trained.seconds)
            keep_pace(self._device.home, pace)
        ready = control_pb2.Ready(
            run_id=terms.run_id,
            round=terms.round,
            weight_class=weight_class(trained.update.weight),
            training_time=Duration(seconds=int(trained.seconds)),
            base_rounds=trained.base_rounds,
        )
        if terms.round < self.newest_round and run.held is not None:
            return  # the newest invitation is answered with it
        if terms.evaluation.report is Report.EACH:
            ready.training_loss = trained.mean_loss
        if run.masking is not None:
            ready.advertisement = await run.masking.advertise(terms.round, terms.attempt)
            ready.identity.CopyFrom(self._device.identity.advertised_identity_key())
        self._send(control_pb2.ConnectRequest(ready=ready))
        cause = "the round's cohort is not complete"
        if run.held is not None:
            staleness = run.state.server.rounds - trained.base_rounds
            cause += f"; the update that is ready is {staleness} rounds old"
        self._here.report(Step.WAITING, terms.round, cause)

    async def _end_training(self, newest: int) -> None:
        """Go on with what a former process trained, from the state that it had."""
        kept = kept_invitation(self._folder)
        if kept is None or kept.round >= newest or not has_checkpoint(self._folder):
            return
        run = await self._take_up(kept)
        if run.held is not None and run.state.last.round == run.terms.previous_round:
            await self._training.done(run)

    async def _take_up(self, message: control_pb2.Invitation) -> Undertaking:
        """Have the plan, the engine, the keys and the state of this run at hand."""
        terms = read_terms(message)
        self._check_policy(terms)
        self.round = terms.round
        self._here.report(Step.PREPARING, terms.round)
        if self._run is not None and self._run.terms.plan != terms.plan:
            raise Refused(Reason.PLAN_MISMATCH, "expected one plan for the whole run")
        if terms.encoding.protection.has_run_key:
            await self._keys.take(message.envelopes)
        if terms.encoding.protection.has_masks and self._masking is None:
            self._masking = await asyncio.to_thread(
                Masking,
                self._folder,
                self._device.identity,
                terms.run_id,
                terms.minimum,
                terms.training.groups or 1,
            )
        plan, engine, state = await self._take_up_plan(terms)
        # In a thread: the first one imports TenSEAL, for which the event loop has no time.
        protection = await asyncio.to_thread(
            UpdateProtection,
            terms,
            lambda: update_length(terms.training, plan.layout, state.server.rounds),
            self._here.agent_id,
            self._device.crypto_processes,
            tail_length(terms.evaluation, plan.task),
            lambda: moved_length(terms.training, plan.layout, state.server.rounds),
        )
        self._run = Undertaking(
            terms,
            plan,
            engine,
            protection,
            state,
            self._keys,
            self._memory(terms, plan, state),
            self._masking if terms.encoding.protection.has_masks else None,
            self._device.rank,
            HeldUpdates(self._folder, terms.run_id) if terms.training.is_asynchronous else None,
        )
        for outcome in message.history:
            await apply_round(self._here, self._run, read_outcome(outcome))
        return self._run

    async def _resume(self) -> Undertaking:
        """Return the run, if need be as a former process of this device left it."""
        if self._run is None and (message := kept_invitation(self._folder)) is not None:
            await self._take_up(message)
        if self._run is None:
            raise Refused(Reason.WRONG_ROUND, "expected an invitation to this run first")
        return self._run

    def _check_policy(self, terms: Terms) -> None:
        minimum, permitted = self._device.minimum_protection, self._device.permitted_release
        if terms.encoding.protection < minimum:
            raise Refused(
                Reason.PROTECTION_TOO_WEAK,
                f"expected at least {minimum.name}, found {terms.encoding.protection.name}: "
                "policy.minimum_protection in agent.toml decides",
            )
        if terms.privacy.sums_are_returned and permitted is not Release.COORDINATOR:
            raise Refused(
                Reason.PROTECTION_TOO_WEAK,
                "expected sums that are released to agents only, found a run that returns them "
                "to the coordinator: policy.release in agent.toml decides",
            )
        protected = terms.encoding.protection is not Protection.PLAIN
        clear = terms.evaluation.report is Report.EACH
        if clear and protected and self._device.permitted_report is not Report.EACH:
            raise Refused(
                Reason.PROTECTION_TOO_WEAK,
                "expected quality that is summed under the run's protection, found a run that asks "
                "for each device's: policy.evaluation in agent.toml decides",
            )

    async def _take_up_plan(self, terms: Terms) -> tuple[Plan, Engine, GlobalState]:
        if self._ground is None:
            folder = self._plan_folder(terms)
            plan = await self._here.transfer.download_plan(
                terms.plan, folder, self._device.resources.require_room
            )
            self._log.info("plan ready", plan=plan.name, parameters=plan.parameter_count)
            engine = await asyncio.to_thread(self._device.engine, folder, plan)
            state = GlobalState(self._folder, plan, folder, terms.training)
            self._ground = (plan, engine, state)
        return self._ground

    def _memory(self, terms: Terms, plan: Plan, state: GlobalState) -> LocalMemory:
        count = remembered(terms.training)
        own = (lambda: state.theta) if keeps_own_model(terms.training) else None
        size = 1 if prunes_rank(terms.training) else plan.parameter_count
        return LocalMemory(self._folder, self.run_id, count, size, own)

    def _plan_folder(self, terms: Terms) -> Path:
        return self._device.home / "plans" / terms.plan.sha256.hex()

    # the way out

    async def cohort(self, message: control_pb2.Cohort) -> None:
        """Encode the update for this cohort and upload it; under masks deal shares first."""
        run = await self._resume()
        update = await self._training.promised(run, message.round)
        await self._contribution.give(run, message, update)

    async def mask_step(self, message: control_pb2.MaskStep) -> None:
        """Follow a message of the cohort's protocol: shares, the accepted list, its certificate."""
        run = await self._resume()
        update = await self._training.promised(run, message.round)
        await self._contribution.mask_step(run, message, update)

    def accepted(self, message: control_pb2.Accepted) -> None:
        """Check that our own upload stands in the accepted list as we sent it, if at all."""
        self._contribution.accepted(message)

    # the way in

    async def result(self, message: control_pb2.Result) -> None:
        """Fetch, open and apply the round's sum, and report the state's digest and quality."""
        outcome = read_outcome(message.outcome)
        run = await self._resume()
        await apply_round(self._here, run, outcome)
        last = run.state.last
        if last.round != outcome.round:
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected the result of a round from {last.round} on, found {outcome.round}",
            )
        self._forget_update()
        applied = control_pb2.Applied(
            run_id=self.run_id,
            round=last.round,
            state_sha256=await asyncio.to_thread(lambda: run.state.sha256),
            saturated=last.saturated,
            next_clip=last.next_clip,
            opened_sha256=last.opened_sha256,
        )
        terms = run.terms.evaluation
        if terms.tell and last.quality is not None:
            applied.quality.CopyFrom(last.quality.to_message())
        if terms.report is Report.EACH:
            evaluation = await self._evaluate(run)
            if evaluation is not None:
                applied.evaluation.count = evaluation.count
                applied.evaluation.correct = evaluation.correct
                applied.evaluation.loss = evaluation.mean_loss
            self._send(control_pb2.ConnectRequest(applied=applied))
        else:  # nobody waits for what this device alone learns, or gives to the next round
            self._send(control_pb2.ConnectRequest(applied=applied))
            try:
                evaluation = await self._evaluate(run)
            except Refused as refused:  # said again when the next round asks for it
                evaluation = None
                self._log.warning("not evaluated", problem=str(refused))
        if not run.fine_tunes_next:
            await self._keep_model(run, run.own_model, evaluation)
        self._here.report(Step.WAITING, last.round, "the next round has not begun")

    async def _evaluate(self, run: Undertaking) -> Evaluation | None:
        evaluation = await asyncio.to_thread(self._evaluations.of_state, run)
        if evaluation is not None:
            self._log.info("evaluated", round=run.state.last.round, **told(evaluation, run))
        return evaluation

    async def return_sum(self, message: control_pb2.ReturnSum) -> None:
        """Upload the opened sum of a round that this device has applied."""
        await return_sum(self._here, await self._resume(), message.round)

    async def finished(self, message: control_pb2.Finished) -> None:
        """Have the run's model among the versions, then forget what only an open run needs."""
        if message.outcome == control_pb2.RUN_OUTCOME_COMPLETED:
            await self._complete(message)
        else:
            self._log.warning("run failed", reason=str(refused_from_details(message.reason)))
        self.drop_update()
        forget_opened(self._folder)
        forget_invitation(self._folder)
        self._training.forget()
        forget_memory(self._folder)
        self._here.report(Step.WAITING, 0, "the run is over")

    async def _complete(self, message: control_pb2.Finished) -> None:
        if self._run is None and kept_invitation(self._folder) is None:
            self._log.warning("run completed without this device")
            return
        run = await self._resume()
        if message.envelopes:  # of keys, perhaps, that were made after our last invitation
            await self._keys.take(message.envelopes)
        for outcome in message.history:
            await apply_round(self._here, run, read_outcome(outcome))
        await self._keep_model(run, await self._training.fine_tuned(run), None)

    async def _keep_model(
        self, run: Undertaking, theta: Theta, evaluation: Evaluation | None
    ) -> None:
        if self._device.models is not None:
            folder = self._plan_folder(run.terms)
            await keep_state(self._device.models, self._here, run, folder, theta, evaluation)
