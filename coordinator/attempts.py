"""The attempts at a run's rounds: the open one's sum and masks, from its cohort to the stored sum.

A run says when an attempt begins and ends (`coordinator.rounds`); here is what lies between, and
what of it is built again after a restart.
"""

import asyncio
from functools import partial
from pathlib import Path
from typing import Protocol

from coordinator.candidates import Candidates
from coordinator.collection import Collection
from coordinator.config import RunConfig
from coordinator.contexts import context_of_cohort
from coordinator.correspondence import Correspondence
from coordinator.events import Event, Ready, SumFailed, SumStored
from coordinator.facilities import Facilities
from coordinator.journal import MaskMessage
from coordinator.masking import Masking
from coordinator.model_state import RunModel
from coordinator.run_state import Phase, RunState
from coordinator.strategies.factored_total import FactorRound
from crypto import cohort
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.strategies.fedma import matched_layers
from fedloom.terms import NEEDS_FACTORS
from fedloom.v1 import control_pb2


class OpenRun(Protocol):
    """The run that attempts are made for."""

    run_id: bytes
    config: RunConfig
    plan: Plan
    agents: Correspondence
    state: RunState

    def post(self, event: Event) -> None:
        """Move the run by one event."""

    def remember(self, happened: MaskMessage) -> None:
        """Write what happened to the journal, unless it is read from there; or StorageFault."""

    def require_whole(self) -> None:
        """Raise StorageFault where what is here may differ from what is stored."""

    def seconds_left(self) -> float:
        """Return how much of the phase is left."""


class Attempts:
    """One after another; `open` is the one that is being made."""

    def __init__(self, run: OpenRun, facilities: Facilities) -> None:
        self._run = run
        self._facilities = facilities
        self._candidates = Candidates(facilities.authority)
        self._storing: asyncio.Task[None] | None = None
        self._model = RunModel(facilities.published, run.run_id, run.config, run.plan)
        self.spool: Path = facilities.spool / run.run_id.hex()
        self.open: Collection | None = None

    @property
    def masking(self) -> Masking | None:
        """The open attempt's masks, where there are any."""
        return None if self.open is None else self.open.masking

    # before

    async def admit(self, ready: Ready) -> None:
        """Raise Refused unless the agent's keys for the masks can be used in the next cohort.

        Checking takes a while, in which the run may go on to another attempt: what counts is that
        the keys are good for the one that is next when this returns.
        """
        while self._run.config.encoding.protection.has_masks:
            if self._run.state.phase is not Phase.TRAINING:
                return  # for no cohort, whatever its keys are
            attempt = self._next_attempt()
            await self._candidates.check(ready, attempt)
            if attempt == self._next_attempt():
                return

    def _next_attempt(self) -> cohort.AttemptId:
        state = self._run.state
        return cohort.AttemptId(self._run.run_id, state.round, state.attempt + 1)

    def admitted(self, ready: Ready) -> None:
        """Keep the agent's keys for the next cohort."""
        if self._run.config.encoding.protection.has_masks:
            self._candidates.keep(ready)

    def begin_round(self) -> None:
        """Forget the keys of the round before."""
        self._candidates.clear()

    # from the cohort to the stored sum

    def begin(self) -> None:
        """Open the sum of the state's cohort and tell its members."""
        run, state = self._run, self._run.state
        self.discard()
        masking = self._masking()
        digest = b"" if masking is None else masking.cohort.digest
        self.open = Collection(
            context_of_cohort(run.run_id, run.config, run.plan, state, digest),
            run.config.encoding.protection,
            state.cohort,
            self.spool / f"{state.round}.{state.attempt}",
            masking,
            self._facilities.metrics,
            self._facilities.crypto_processes,
            run.config.aggregation,
            matched_layers(run.config.training, run.plan.layout, state.completed),
            self._factors(),
        )
        run.agents.cohort(state.cohort, state, self.open, run.seconds_left())
        if state.policy.is_asynchronous:
            return  # who trains goes on
        late = state.invited - set(state.cohort)
        run.agents.waiting(late, state, control_pb2.WAIT_CAUSE_ROUND_CLOSED)

    def _factors(self) -> FactorRound | None:
        """Return what the round's sum follows from where it takes every device's factors."""
        run = self._run
        if run.config.training.lora not in NEEDS_FACTORS:
            return None
        # A journal that is replayed may open an attempt whose sum is stored already.
        history = tuple(one for one in run.agents.history if one.round < run.state.round)
        before = partial(self._model.after, history)
        return FactorRound(run.config.training, run.plan, len(history), before)

    def _masking(self) -> Masking | None:
        run, state = self._run, self._run.state
        if not run.config.encoding.protection.has_masks:
            return None
        return Masking(
            cohort.AttemptId(run.run_id, state.round, state.attempt),
            state.policy.minimum_agents,
            self._candidates.of(state.cohort),
            lambda agent, message: run.agents.mask_step(agent, state.round, message),
            lambda agent, message: run.remember(MaskMessage(agent, message)),
            self._facilities.metrics,
            run.config.aggregation.groups,
        )

    def repeat(self, agent: str) -> None:
        """Tell a member about the open cohort again."""
        opened = self._opened()
        self._run.agents.cohort([agent], self._run.state, opened, self._run.seconds_left())
        self.repeat_masks(agent)

    def repeat_masks(self, agent: str) -> None:
        """Tell a member what it may have missed of its cohort's protocol."""
        if self.masking is not None:
            self.masking.repeat(agent)

    async def heard(self, agent: str, message: bytes) -> None:
        """Carry on what a member says in its cohort's protocol; raises Refused."""
        if self.masking is None:
            raise Refused(Reason.WRONG_ROUND, "expected no mask step: no cohort")
        await self.masking.heard(agent, message)

    def counted(self, agent: str, sha256: bytes) -> None:
        """An update is in the sum, and the run knows it."""
        if self.open is not None:
            self.open.counted(agent, sha256)

    @property
    def adding(self) -> str | None:
        """The agent whose update is on its way into the sum."""
        return None if self.open is None else self.open.sum.adding

    def close(self) -> None:
        """Accept no update any more, and tell the members which are in."""
        opened = self._opened()
        self._run.agents.accepted(self._run.state, opened.sum.slots)
        opened.close()

    def store(self) -> None:
        """Begin to store the closed sum; `check` raises what that fails with."""
        self._storing = asyncio.create_task(self._store(self._opened()))

    async def _store(self, closed: Collection) -> None:
        """Publish the sum and make it history, before anyone is told of it."""
        run, seconds = self._run, self._run.config.deadlines.upload
        record = await closed.stored(run.state, self._facilities.published, seconds)
        if closed is not self.open:
            return  # the run was cancelled meanwhile
        if record is None:
            run.post(SumFailed())
            return
        self._facilities.store.add_round(run.run_id, record)
        run.agents.history = (*run.agents.history, record)
        run.post(SumStored())
        await asyncio.to_thread(closed.sum.discard)

    def check(self) -> None:
        """Raise what keeps the sum from being stored."""
        if self._storing is not None and self._storing.done():
            self._storing.result()

    def discard(self) -> None:
        """Forget the open attempt and what is spooled of it."""
        if self.open is not None:
            self.open.discard()
        self.open = None

    def abandon(self) -> None:
        """Let the open attempt be, with what is spooled of it: it is built again from there."""
        if self.masking is not None:
            self.masking.close()
        self.open = None

    # after a restart

    async def replayed(self) -> None:
        """Wait until the open attempt is where the journal leaves it."""
        if self.masking is not None:
            await self.masking.idle()

    async def restore(self) -> None:
        """Build the open sum again from the spool, and go on with storing it."""
        run = self._run
        if self.open is None or run.state.phase not in (Phase.COLLECTING, Phase.SUMMING):
            return
        if not await self.open.restore(run.state.uploaded):
            run.post(SumFailed())
        elif run.state.phase is Phase.SUMMING:
            if run.agents.history and run.agents.history[-1].round == run.state.round:
                run.post(SumStored())
            else:
                self.store()

    def _opened(self) -> Collection:
        if self.open is None:
            raise AssertionError("expected an attempt, which begins before all this")
        return self.open
