"""Local training for the round in hand: done once, taken up by a later process, dropped if late."""

import asyncio
import math
from dataclasses import dataclass

from edge_agent.checkpoints import Checkpoint, discard_checkpoint
from edge_agent.invitations import Terms
from edge_agent.local_rules import Outgoing, outgoing
from edge_agent.seeds import order_seed
from edge_agent.status import Step
from edge_agent.undertaking import Interrupted, Surroundings, Undertaking
from fedloom.errors import Reason, Refused
from fedloom.strategies import algorithm


@dataclass(frozen=True)
class Trained:
    """What came out of a round's training."""

    round: int
    update: Outgoing
    mean_loss: float
    seconds: float


class Training:
    """This device's training in one run."""

    def __init__(self, here: Surroundings) -> None:
        self._here = here
        self._trained: Trained | None = None
        self._interrupted = False
        self._closed_round = 0  # the last one that went on without this device
        self.progress = 0.0  # of the training in hand, 0..1

    def begin(self) -> None:
        """An invitation is taken up: what interrupted the one before is past."""
        self._interrupted = False

    def interrupt(self) -> None:
        """Stop the training in hand: the run goes on without it."""
        self._interrupted = True

    def close(self, round_number: int) -> None:
        """Stop the training for a round that was closed without this device, and drop it."""
        self.interrupt()
        self.forget()
        self._closed_round = round_number

    def forget(self) -> None:
        """Drop what was trained: it is in the state, or of no use any more."""
        self._trained = None
        discard_checkpoint(self._here.folder)

    async def done(self, run: Undertaking) -> Trained:
        """Return what the round's training gave, once it is done."""
        if self._trained is None or self._trained.round != run.terms.round:
            self._trained = await self._train(run)
        return self._trained

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
        if run.state.last.round != terms.previous_round:
            raise Refused(
                Reason.STATE_DIVERGED,
                f"expected the state after round {terms.previous_round}, "
                f"found that after {run.state.last.round}",
            )
        self.progress = 0.0
        self._here.report(Step.TRAINING, terms.round)
        self._here.log.info("training", round=terms.round)
        checkpoint = Checkpoint(self._here.folder, terms.run_id, terms.round)
        try:
            trained = await asyncio.to_thread(self._trained_update, run, checkpoint)
            self._heed(1.0)  # an interruption after the last step counts too
        except Interrupted:
            checkpoint.discard()
            raise
        return trained

    def _trained_update(self, run: Undertaking, checkpoint: Checkpoint) -> Trained:
        """Train, and make of the movement what the run's strategy sends."""
        terms, state, memory = run.round_terms, run.state.server, run.memory.vectors()
        update = run.engine.train(
            state.theta,
            terms,
            self._order_seed(run.terms),
            self._heed,
            checkpoint,
            algorithm(terms).linear(state, memory),
        )
        if not math.isfinite(update.mean_loss):
            raise Refused(
                Reason.TRAINING_FAILED, f"expected a finite loss, found {update.mean_loss}"
            )
        self._here.log.info(
            "trained",
            round=run.terms.round,
            samples=update.samples,
            loss=round(update.mean_loss, 4),
            seconds=round(checkpoint.seconds, 1),
        )
        sent = outgoing(terms, state, memory, update)
        return Trained(run.terms.round, sent, update.mean_loss, checkpoint.seconds)

    def _heed(self, share: float) -> None:
        """Called by the engine, in its thread, after every step."""
        self.progress = share
        if self._interrupted:
            raise Interrupted

    def _order_seed(self, terms: Terms) -> int:
        return order_seed(terms.training.seed, terms.run_id, terms.round, self._here.agent_id)
