"""One run being executed: events go into the state machine, its effects come out as I/O.

Events are handled on the event loop's thread, each one remembered and acted upon before the next
is looked at; arithmetic on updates, and with keys, is done in threads and comes back as an event.
What changed the state is in the journal first: a coordinator that is killed replays it and goes on.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import structlog

from coordinator.attempts import Attempts
from coordinator.audit import COORDINATOR, Action, AuditLog
from coordinator.clock import Clock
from coordinator.config import RunConfig
from coordinator.contexts import encoded_length
from coordinator.correspondence import Correspondence
from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    Applied,
    AskForSum,
    CloseCohort,
    CloseRound,
    Declined,
    Effect,
    Event,
    FinishRun,
    Invite,
    KeyShared,
    OpenCohort,
    PublishResult,
    Ready,
    Reject,
    RepeatCohort,
    ShareKey,
    TakenUp,
    Tick,
    Uploaded,
    Wished,
)
from coordinator.facilities import Facilities
from coordinator.faults import StorageFault
from coordinator.journal import Journal, MaskMessage
from coordinator.metrics import RunMeter
from coordinator.reports import RoundReports
from coordinator.round_sum import load_protection
from coordinator.rounds import handle
from coordinator.run_keys import Grant
from coordinator.run_state import Phase, RunState, Wish
from coordinator.selection import UNKNOWN, Traits
from coordinator.store import RunRecord
from coordinator.uploads import Uploads
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.quality import Quality, named

_log = structlog.get_logger()


class Execution:
    """Drives one run until it is over."""

    def __init__(
        self, record: RunRecord, config: RunConfig, plan: Plan, facilities: Facilities
    ) -> None:
        self.run_id = record.run_id
        self.config = config
        self.plan = plan
        self.finished = asyncio.Event()
        self._store = facilities.store
        self._clock = Clock()
        self.agents = Correspondence(record, config, facilities)
        self._audit = AuditLog(facilities.store.engine)
        self._meter = RunMeter(facilities.metrics, self._clock.now())
        self._journal = Journal(facilities.store, record.run_id)
        self._log = _log.bind(run=record.name)
        self._reports = RoundReports(
            facilities.store, record.run_id, self._update_length, self._log
        )
        self._attempts = Attempts(self, facilities)
        self.uploads = Uploads(self, self._attempts, facilities, self._log)
        self._broken: StorageFault | None = None
        self._round_started = 0.0
        self._departed: set[str] = set()  # while their updates are on their way into the sum
        self.state = RunState(config.policy, self._clock.now() + config.policy.gathering_seconds)

    def _update_length(self) -> int:
        """Return how many values an update had in the last round of the run's history."""
        before = len(self.agents.history) - 1
        return encoded_length(self.config, self.plan, before)

    # starting and starting again

    async def restore(self) -> None:
        """Go where the journal leaves the run; nobody is told anything yet."""
        await asyncio.to_thread(load_protection, self.config.encoding.protection)
        if await self._replay():
            self._log.info("run resumed", round=self.state.round, phase=self.state.phase.value)
        else:
            self._journal.restart(self._clock.now(), self.state)
        await self._attempts.restore()

    def take_up(self, connected: Mapping[str, Traits]) -> None:
        """Go on with those who are here.

        They come as one: else a round would begin with the first `minimum` of them.
        """
        told = {agent: said for agent, said in connected.items() if said != UNKNOWN}
        self.post(TakenUp(frozenset(connected), told))

    async def _replay(self) -> bool:
        """Repeat what the journal says, without telling anyone; False when it is empty."""
        self.agents.muted = True
        empty = True
        for at, happened in self._journal.read():
            empty = False
            match happened:
                case RunState():
                    self.state = replace(happened, policy=self.config.policy)
                    self._round_started = at
                case MaskMessage(agent, message):
                    await self.heard_mask_step(agent, message)
                case _:
                    self._move(happened, at)
        await self._attempts.replayed()
        self.agents.muted = False
        return not empty

    def check(self) -> None:
        """Raise what keeps the run from going on: it must not seem to wait."""
        self.require_whole()
        self._attempts.check()

    def obey(self, wish: Wish) -> None:
        """Do what the operator wants of the run, if it is not done yet."""
        if (wish is Wish.PAUSE) != self.state.paused or wish is Wish.CANCEL:
            self.post(Wished(wish))

    # events

    def post(self, event: Event) -> None:
        """Move the run by one event: first what must be remembered, then what must be done."""
        self._let_go()
        if self._is_adding(event):
            if isinstance(event, AgentDisconnected):
                self._departed.add(event.agent)
            return
        if isinstance(event, AgentConnected):
            self._departed.discard(event.agent)
            self.agents.forget(event.agent)
        effects = self._move(event, self._clock.now())
        if isinstance(event, AgentConnected):
            self._welcome(event.agent, effects)
        elif isinstance(event, TakenUp):
            for agent in sorted(event.agents):
                self._welcome(agent, effects)

    def _let_go(self) -> None:
        """Tell the run of those who left while their updates were added."""
        for agent in sorted(self._departed - {self._attempts.adding}):
            self._departed.discard(agent)
            self._move(AgentDisconnected(agent), self._clock.now())

    def _move(self, event: Event, now: float) -> tuple[Effect, ...]:
        self.require_whole()
        try:
            return self._make_move(event, now)
        except StorageFault as fault:
            self.abandon(fault)
            raise

    def abandon(self, fault: StorageFault) -> None:
        """Do nothing any more: what is here may differ from what is stored, and that counts."""
        self._broken = fault
        self._attempts.abandon()

    def require_whole(self) -> None:
        """Raise StorageFault where what is here may differ from what is stored."""
        if self._broken is not None:
            raise StorageFault(self._broken.where, self._broken.problem) from self._broken

    def _make_move(self, event: Event, now: float) -> tuple[Effect, ...]:
        before = self.state
        after, effects = handle(before, event, now)
        if after is before and not effects:
            return ()
        if not self.agents.muted:
            self._journal.append(now, event)
            self._meter.moved(before, after, now)
        self.state = after
        if isinstance(event, Ready) and after is not before and before.phase is Phase.TRAINING:
            self._attempts.admitted(event)
        if isinstance(event, Uploaded):
            self._attempts.counted(event.agent, event.sha256)
        if _place(before) != _place(after):
            self._store.update_run(
                self.run_id, after.phase, after.round, after.attempt, after.reason
            )
            self._log.info("run moved", phase=after.phase.value, round=after.round)
        for effect in effects:
            self._perform(effect, before, now)
        return effects

    def _welcome(self, agent: str, effects: tuple[Effect, ...]) -> None:
        """Tell an agent that came what it has missed, or why nothing is asked of it."""
        state = self.state
        if state.phase is Phase.SUMMING and self._attempts.masking:
            self._attempts.repeat_masks(agent)  # the list that it vouches for
        elif not effects and not state.phase.over:
            self.agents.nothing_to_do(agent, state, self._clock.now())

    def _is_adding(self, event: Event) -> bool:
        """While an update is on its way into the sum, nothing may close the sum without it."""
        adding = self._attempts.adding
        its_agents = isinstance(event, Declined | AgentDisconnected) and event.agent == adding
        return adding is not None and (isinstance(event, Tick) or its_agents)

    def remember(self, happened: MaskMessage) -> None:
        """Write what happened to the journal, unless it is read from there; or StorageFault."""
        if self.agents.muted:
            return
        try:
            self._journal.append(self._clock.now(), happened)
        except StorageFault as fault:
            self.abandon(fault)
            raise

    async def heard(self, event: KeyShared | Ready | Applied | Declined) -> None:
        """Remember what an agent reports, then move the run."""
        match event:
            case KeyShared():
                grant = self.state.grant
                if grant is None or (event.agent, event.key_id) != (grant.holder, grant.key_id):
                    return
                self.agents.keep_envelopes(grant, dict(event.envelopes))
            case Ready():
                if not await self._admitted(event):
                    return
            case Applied():
                history = self.agents.history
                last = history[-1] if history and event.round == history[-1].round else None
                self._reports.applied(self.state, event, last)
                if last is not None:
                    self.agents.knows(event.agent, len(history))
            case Declined():
                self._reports.declined(self.state, event)
        self.post(event)

    async def _admitted(self, event: Ready) -> bool:
        """Check what comes with READY; False when it is of no use, which the agent is told."""
        if not self.state.takes(event.round):
            self._log.info("ready for a later round", agent=event.agent, round=event.round)
            return False
        try:
            await self._attempts.admit(event)
        except Refused as refused:
            overtaken = self.state.policy.is_asynchronous and refused.reason is Reason.WRONG_ROUND
            if not overtaken:  # else the next invitation asks for other keys
                self.refuse(event.agent, refused)
                self.post(Declined(event.agent, event.round, refused.reason))
            return False
        if self.finished.is_set():
            return False  # while its keys were checked
        self._reports.ready(self.state, event)
        if self.state.policy.is_asynchronous and self.state.takes(event.round):
            # Whoever answers an invitation has applied its history, whatever it trained from.
            self.agents.knows(event.agent, len(self.agents.history))
        return True

    async def heard_mask_step(self, agent: str, message: bytes) -> None:
        """Carry on what a member says in its cohort's protocol."""
        try:
            await self._attempts.heard(agent, message)
        except Refused as refused:
            self.refuse(agent, refused)

    def heard_progress(self, agent: str, round_number: int, share: float) -> None:
        """Remember how far an agent's training is, in whichever round it began if rounds go on."""
        if self.state.policy.is_asynchronous:
            round_number = self.state.round
        self._reports.progress(self.state, agent, round_number, share)

    def count_traffic(self, agent: str, sent: int, received: int) -> None:
        """Count payload bytes of the agent's artifacts towards the round."""
        self._reports.count_traffic(agent, sent, received)

    # effects

    def _perform(  # noqa: C901 - one arm per effect
        self, effect: Effect, before: RunState, now: float
    ) -> None:
        match effect:
            case ShareKey(grant):
                self._log.info("run key asked", key_id=grant.key_id, fresh=grant.fresh)
                self._record_rotation(grant)
                self.agents.ask_for_key(grant)
            case Invite(agents):
                self._invite(agents, before, now)
            case OpenCohort():
                self._attempts.begin()
            case RepeatCohort(agent):
                self._attempts.repeat(agent)
            case CloseCohort():
                self._close_cohort()
            case PublishResult(agents):
                self.agents.result(agents)
            case AskForSum(agent):
                self.agents.ask_for_sum(agent, self.state.round)
            case AbandonRound():
                self._log.warning("round abandoned", round=before.round)
                self._attempts.discard()
            case CloseRound(quality):
                self._close_round(before, quality, now)
            case FinishRun():
                self._finish()
            case Reject(agent, reason, subject):
                self.refuse(agent, Refused(reason, subject))

    def _record_rotation(self, grant: Grant) -> None:
        if grant.fresh and not self.agents.muted:
            run, key = self.run_id.hex(), grant.key_id
            self._audit.append(f"agent {grant.holder}", Action.RUN_KEY_ROTATED, run, key_id=key)

    def _invite(self, agents: frozenset[str], before: RunState, now: float) -> None:
        # A repeated invitation keeps the deadline: the round goes on, it does not start anew.
        state = self.state
        if state.phase is Phase.TRAINING and before.deadline != state.deadline:
            self._round_started = now
            self._reports.open_round()
            self._log.info("round started", round=state.round, invited=len(agents))
            self.agents.dismiss(state.connected - agents, state, now)
        masked = self.config.encoding.protection.has_masks
        if masked and state.phase is Phase.COLLECTING:
            return  # an invitation is for the next attempt: joining it gives this one up
        self.agents.invite(agents, state, self.seconds_left())

    def _close_cohort(self) -> None:
        self._attempts.close()
        if not self.agents.muted:
            self._attempts.store()

    def _close_round(self, before: RunState, quality: Quality | None, now: float) -> None:
        number, seconds = before.round, now - self._round_started
        found = {} if quality is None else named(quality, self.plan.task)
        loss = None if quality is None else quality.training_loss
        self._reports.close_round(number, seconds, found, loss)
        if not self.agents.muted:
            self._meter.measured(found)
        self._attempts.discard()
        self._attempts.begin_round()
        self._journal.restart(now, self.state)
        told = _staleness(before)
        self._log.info("round finished", round=number, seconds=round(seconds, 3), **found, **told)

    def _finish(self) -> None:
        state = self.state
        self._attempts.discard()
        self.agents.finished(state)
        reason = None if state.reason is None else state.reason.name
        if state.plateau.is_reached(state.policy.plateau):
            self._log.info("plateau reached", what=str(state.policy.plateau))
        self._log.info("run finished", phase=state.phase.value, reason=reason)
        self._audit.append(
            COORDINATOR,
            Action.RUN_FINISHED,
            self.run_id.hex(),
            phase=state.phase.value,
            reason=reason,
        )
        self._journal.clear()
        self.finished.set()

    def refuse(self, agent: str, refused: Refused) -> None:
        """Tell an agent that its step is refused."""
        self._log.info("step refused", agent=agent, reason=refused.reason.name)
        self.agents.refuse(agent, self.state.round, refused)

    def seconds_left(self) -> float:
        """Return how much of the phase is left."""
        return max(0.0, self.state.deadline - self._clock.now())


def _staleness(state: RunState) -> dict[str, float]:
    """Return how old the updates in an asynchronous round's sum were, in rounds."""
    found = [state.staleness[agent] for agent in state.uploaded]
    if not state.policy.is_asynchronous or not found:
        return {}
    return {"mean_staleness": round(sum(found) / len(found), 3), "max_staleness": max(found)}


def _place(state: RunState) -> tuple[Phase, int, int]:
    return state.phase, state.round, state.attempt
