"""Local training for the round in hand: done once, taken up by a later process, dropped if late."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.checkpoints import Checkpoint, discard_checkpoint
from edge_agent.engine import LocalUpdate
from edge_agent.evaluations import Evaluations
from edge_agent.held_updates import HeldUpdate, HeldUpdates
from edge_agent.invitations import Terms
from edge_agent.local_rules import Outgoing, joined, outgoing, strategys
from edge_agent.ranks import OwnRank
from edge_agent.seeds import order_seed
from edge_agent.status import Step
from edge_agent.undertaking import Interrupted, Surroundings, Undertaking
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.quality import Report, tail_shares
from fedloom.strategies import Memory, algorithm
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.ditto import personal_terms, pull
from fedloom.strategies.fine_tuning import fine_tuning_terms
from fedloom.strategies.parts import Parts
from fedloom.strategies.portions import keeps_own_model, start_of
from fedloom.terms import LocalTraining, LoraRule, Personal


@dataclass(frozen=True)
class Trained:
    """What came out of a round's training."""

    round: int
    update: Outgoing
    mean_loss: float
    seconds: float
    samples: int
    base_rounds: int = 0  # asynchronous: applied to the state that it was made from


class Training:
    """This device's training in one run."""

    def __init__(self, here: Surroundings, evaluations: Evaluations) -> None:
        self._here = here
        self._evaluations = evaluations
        self._trained: Trained | None = None
        self._interrupted = False
        self._alone = False  # what is trained is nobody else's
        self._closed_round = 0  # the last one that went on without this device
        self.progress = 0.0  # of the training in hand, 0..1
        self.is_under_way = False

    def begin(self) -> None:
        """An invitation is taken up: what interrupted the one before is past."""
        self._interrupted = False

    def interrupt(self) -> None:
        """Stop the training in hand: the run goes on without it."""
        self._interrupted = True

    def overtaken(self) -> None:
        """The run went on, or another has begun: stop what was trained for a round."""
        if not self._alone:
            self.interrupt()

    def close(self, round_number: int) -> None:
        """Stop the training for a round that was closed without this device, and drop it."""
        self.interrupt()
        self.forget()
        self._closed_round = round_number

    def forget(self) -> None:
        """Drop what was trained: it is in the state, or of no use any more."""
        self._trained = None
        discard_checkpoint(self._here.folder)
        discard_checkpoint(self._own_folder)

    async def done(self, run: Undertaking) -> Trained:
        """Return what the round's training gave, once it is done."""
        if self._trained is None or self._trained.round != run.terms.round:
            held = run.held
            self._trained = await (self._train(run) if held is None else self._join(run, held))
        return self._trained

    async def _join(self, run: Undertaking, held: HeldUpdates) -> Trained:
        """Return what this device holds, or trains now, as an asynchronous round's sum takes it."""
        _require_state(run)
        update = await asyncio.to_thread(self._usable, run, held)
        if update is None:
            update = await self._hold(run, held)
        terms, layout = run.terms.training, run.plan.layout
        sent = await asyncio.to_thread(joined, terms, run.state.server, layout, update)
        loss, seconds, samples = update.mean_loss, update.seconds, update.samples
        return Trained(run.terms.round, sent, loss, seconds, samples, update.base_rounds)

    def _usable(self, run: Undertaking, held: HeldUpdates) -> HeldUpdate | None:
        """Return what is held, unless it is too old, or may be in a sum that we cannot open."""
        update, place, masking = held.read(), held.proposed, run.masking
        if update is None:
            return None
        staleness = run.state.server.rounds - update.base_rounds
        spent = masking is not None and place is not None and masking.has_vouched(place.round)
        if 0 <= staleness <= run.terms.training.max_staleness and not spent:
            return update
        self._here.log.info("update dropped", round=update.round, staleness=staleness, spent=spent)
        held.drop()
        return None

    async def _hold(self, run: Undertaking, held: HeldUpdates) -> HeldUpdate:
        """Train from the newest state, and hold the update from then on."""
        base, trained = run.state.server.rounds, await self._train(run)
        sent = trained.update
        update = HeldUpdate(
            base,
            trained.round,
            sent.values[: len(sent.values) - len(sent.shares)],
            sent.shares,
            sent.weight,
            trained.mean_loss,
            trained.seconds,
            trained.samples,
        )
        await asyncio.to_thread(held.keep, update)
        discard_checkpoint(self._here.folder)
        return update

    async def promised(self, run: Undertaking, round_number: int) -> Outgoing | None:
        """Return the update for a round's cohort, trained again if a former process had it.

        Its checkpoint makes that quick. None for a round that is past or not in hand, and where the
        update is not needed: its bytes are fixed already.
        """
        terms = run.terms
        if self._trained is None or self._trained.round != terms.round:
            fixed = run.masking is not None and run.masking.upload_sha256
            past = terms.round in (self._closed_round, run.state.last.round)
            if fixed or past or round_number != terms.round:
                return None
        return (await self.done(run)).update

    async def _train(self, run: Undertaking) -> Trained:
        terms = run.terms
        _require_state(run)
        self.progress = 0.0
        self._here.report(Step.TRAINING, terms.round)
        self._here.log.info("training", round=terms.round)
        checkpoint = Checkpoint(self._here.folder, terms.run_id, terms.round)
        self.is_under_way = True
        try:
            trained = await asyncio.to_thread(self._trained_update, run, checkpoint)
            self._heed(1.0)  # an interruption after the last step counts too
        except Interrupted:
            checkpoint.discard()
            discard_checkpoint(self._own_folder)
            raise
        finally:
            self.is_under_way = False
        return trained

    def _trained_update(self, run: Undertaking, checkpoint: Checkpoint) -> Trained:
        """Train, and make of the movement what the run's strategy sends."""
        terms, state, layout = run.round_terms, run.state.server, run.plan.layout
        memory = run.memory.vectors()
        evaluation = None
        if run.terms.evaluation.report is Report.MEAN:
            evaluation = self._evaluations.of_state(run)  # which training begins with
            self._heed(0.0)
        linear = algorithm(terms, layout).linear(state, strategys(terms, memory))
        start = start_of(terms, layout, state.theta, memory)
        own: Vector | None = None
        if terms.lora is LoraRule.HETLORA:
            ranks = OwnRank.of(terms, layout, run.rank, memory)
            start = ranks.start(start)
            moved = self._moved(run, checkpoint, start, terms, linear, ranks.parts(run.parts))
            update, own = ranks.finished(state.theta, start, moved)
            if own is not None and own[0] < ranks.rank:
                self._here.log.info("rank pruned", before=ranks.rank, rank=int(own[0]))
        else:
            update = self._moved(run, checkpoint, start, terms, linear, run.parts)
            if keeps_own_model(terms):
                own = self._own_after(run, memory, start, update)
        self._here.log.info(
            "trained",
            round=run.terms.round,
            samples=update.samples,
            loss=round(update.mean_loss, 4),
            seconds=round(checkpoint.seconds, 1),
        )
        shares = tail_shares(run.terms.evaluation, run.plan.task, update.mean_loss, evaluation)
        sent = outgoing(terms, state, memory, update, layout, own, shares)
        seconds = checkpoint.seconds
        return Trained(run.terms.round, sent, update.mean_loss, seconds, update.samples)

    def _own_after(
        self, run: Undertaking, memory: Memory, start: Theta, update: LocalUpdate
    ) -> Theta:
        """Return this device's own model after the round: trained in it, or beside it."""
        terms = run.round_terms
        if terms.personal is not Personal.DITTO:
            own: Theta = start + update.delta
            return own
        before, theta = memory[-1], run.state.theta
        drawn = pull(before, theta, terms.personal_lambda)
        checkpoint = self._own_checkpoint(run)
        moved = self._moved(run, checkpoint, before, personal_terms(terms), drawn, run.parts)
        return np.add(before, moved.delta, out=moved.delta)

    def _moved(
        self,
        run: Undertaking,
        checkpoint: Checkpoint,
        start: Theta,
        terms: LocalTraining,
        linear: Theta | None,
        parts: Parts | None,
    ) -> LocalUpdate:
        seed = self._order_seed(run.terms)
        update = run.engine.train(start, terms, seed, self._heed, checkpoint, linear, parts)
        if not math.isfinite(update.mean_loss):
            raise Refused(
                Reason.TRAINING_FAILED, f"expected a finite loss, found {update.mean_loss}"
            )
        return update

    async def fine_tuned(self, run: Undertaking) -> Theta:
        """Return the finished run's model for this device, trained on its data where terms say so.

        A device whose data does not train any more keeps the model as the run left it, and one that
        has lost what was its own the model of all.
        """
        try:
            theta = await asyncio.to_thread(lambda: run.own_model)
        except Refused as refused:
            self._here.log.warning("own model lost", problem=str(refused))
            return run.state.theta
        if not run.terms.training.fine_tune_steps:
            return theta
        self.begin()
        self._here.report(Step.TRAINING, run.terms.round, "fine-tuning on this device's own data")
        self._alone = True
        try:
            return await asyncio.to_thread(self._fine_tuned, run, theta)
        except Refused as refused:
            self._here.log.warning("not fine-tuned", problem=str(refused))
            return theta
        finally:
            self._alone = False

    def _fine_tuned(self, run: Undertaking, theta: Theta) -> Theta:
        """Train every value: nothing is sent, so no part has to rest."""
        terms, seed = fine_tuning_terms(run.terms.training), self._order_seed(run.terms)
        checkpoint = self._own_checkpoint(run)
        update = run.engine.train(theta, terms, seed, self._heed, checkpoint, None, None)
        self._here.log.info("fine-tuned", steps=terms.local_steps, loss=round(update.mean_loss, 4))
        return np.add(theta, update.delta, out=update.delta)

    def _own_checkpoint(self, run: Undertaking) -> Checkpoint:
        """What outlives the process of the training that nobody else is told of."""
        self._own_folder.mkdir(exist_ok=True)
        return Checkpoint(self._own_folder, run.terms.run_id, run.terms.round)

    @property
    def _own_folder(self) -> Path:
        return self._here.folder / "own"

    def _heed(self, share: float) -> None:
        """Called by the engine, in its thread, after every step."""
        self.progress = share
        if self._interrupted:
            raise Interrupted

    def _order_seed(self, terms: Terms) -> int:
        return order_seed(terms.training.seed, terms.run_id, terms.round, self._here.agent_id)


def _require_state(run: Undertaking) -> None:
    before, found = run.terms.previous_round, run.state.last.round
    if found != before:
        raise Refused(
            Reason.STATE_DIVERGED,
            f"expected the state after round {before}, found that after {found}",
        )
