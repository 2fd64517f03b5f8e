"""One run being executed: events go into the state machine, its effects come out as I/O.

Everything but the arithmetic of sums happens on the event loop's thread, so that an event is
handled, remembered and acted upon before the next one is looked at. What changed the state is in
the journal first: a coordinator that is killed replays it and goes on.
"""

import asyncio
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

import structlog
from cryptography import x509

from coordinator.audit import COORDINATOR, Action, AuditLog
from coordinator.clock import Clock
from coordinator.collection import Collection
from coordinator.config import RunConfig
from coordinator.contexts import context_of_cohort, context_of_round
from coordinator.correspondence import Correspondence
from coordinator.events import (
    AbandonRound,
    AgentConnected,
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
    SumFailed,
    SumReturned,
    SumStored,
    TakenUp,
    Tick,
    Uploaded,
    Wished,
)
from coordinator.faults import StorageFault
from coordinator.journal import Journal, MaskMessage
from coordinator.masking import Candidate, Masking, known_candidate, read_candidate
from coordinator.metrics import Metrics, RunMeter
from coordinator.published import Published
from coordinator.reports import RoundReports
from coordinator.returned_sum import ReturnedSum
from coordinator.round_sum import Upload, UploadKind, load_protection
from coordinator.rounds import handle
from coordinator.run_keys import Grant
from coordinator.run_state import Phase, RunState, Wish
from coordinator.sessions import Sessions
from coordinator.store import RunRecord, Store
from crypto import cohort
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.strategies import update_length
from fedloom.v1 import control_pb2

SATURATION_WARNING = 1e-3  # share of a round's values beyond its clip
_log = structlog.get_logger()


class Execution:
    """Drives one run until it is over."""

    def __init__(
        self,
        record: RunRecord,
        config: RunConfig,
        plan: Plan,
        store: Store,
        sessions: Sessions,
        published: Published,
        spool: Path,
        authority: x509.Certificate,
        metrics: Metrics,
        crypto_processes: int = 1,
    ) -> None:
        self.run_id = record.run_id
        self.config = config
        self.finished = asyncio.Event()
        self._plan = plan
        self._store = store
        self._agents = Correspondence(record, config, store, sessions)
        self._published = published
        self._spool = spool / record.run_id.hex()
        self._authority = authority
        self._metrics = metrics
        self._audit = AuditLog(store.engine)
        self._crypto_processes = crypto_processes
        self._clock = Clock()
        self._meter = RunMeter(metrics, self._clock.now())
        self._journal = Journal(store, record.run_id)
        self._candidates: dict[str, Candidate] = {}  # under masks: agents that said READY
        self._collection: Collection | None = None
        self._counting: set[asyncio.Task[None]] = set()
        self._storing: asyncio.Task[None] | None = None
        self._broken: StorageFault | None = None
        self._round_started = 0.0
        self._reports = RoundReports(store, record.run_id)
        self._log = _log.bind(run=record.name)
        self.state = RunState(config.policy, self._clock.now() + config.policy.gathering_seconds)

    # starting and starting again

    async def restore(self) -> None:
        """Go where the journal leaves the run; nobody is told anything yet."""
        await asyncio.to_thread(load_protection, self.config.encoding.protection)
        if self._replay():
            self._log.info("run resumed", round=self.state.round, phase=self.state.phase.value)
        else:
            self._journal.restart(self._clock.now(), self.state)
        if self._collection is not None and self.state.phase in (Phase.COLLECTING, Phase.SUMMING):
            await self._restore_sum(self._collection)

    def take_up(self, connected: Set[str]) -> None:
        """Go on with those who are here.

        They come as one: else a round would begin with the first `minimum` of them.
        """
        self.post(TakenUp(frozenset(connected)))

    def _replay(self) -> bool:
        """Repeat what the journal says, without telling anyone; False when it is empty."""
        self._agents.muted = True
        empty = True
        for at, happened in self._journal.read():
            empty = False
            match happened:
                case RunState():
                    self.state = replace(happened, policy=self.config.policy)
                    self._round_started = at
                case MaskMessage(agent, message):
                    self.heard_mask_step(agent, message)
                case _:
                    self._move(happened, at)
        self._agents.muted = False
        return not empty

    async def _restore_sum(self, collection: Collection) -> None:
        """Build the open sum again from the spool, and go on with storing it."""
        if not await collection.restore(self.state.uploaded):
            self.post(SumFailed())
        elif self.state.phase is Phase.SUMMING:
            if self._agents.history and self._agents.history[-1].round == self.state.round:
                self.post(SumStored())
            else:
                self._storing = asyncio.create_task(self._store_sum())

    def check(self) -> None:
        """Raise what keeps the run from going on: it must not seem to wait."""
        self._require_whole()
        if self._storing is not None and self._storing.done():
            self._storing.result()

    def obey(self, wish: Wish) -> None:
        """Do what the operator wants of the run, if it is not done yet."""
        if (wish is Wish.PAUSE) != self.state.paused or wish is Wish.CANCEL:
            self.post(Wished(wish))

    # events

    def post(self, event: Event) -> None:
        """Move the run by one event: first what must be remembered, then what must be done."""
        if self._is_adding(event):
            return
        if isinstance(event, AgentConnected):
            self._agents.forget(event.agent)
        effects = self._move(event, self._clock.now())
        if isinstance(event, AgentConnected):
            self._welcome(event.agent, effects)
        elif isinstance(event, TakenUp):
            for agent in sorted(event.agents):
                self._welcome(agent, effects)

    def _move(self, event: Event, now: float) -> tuple[Effect, ...]:
        self._require_whole()
        try:
            return self._make_move(event, now)
        except StorageFault as fault:
            self.abandon(fault)
            raise

    def abandon(self, fault: StorageFault) -> None:
        """Do nothing any more: what is here may differ from what is stored, and that counts."""
        self._broken = fault
        self._collection = None

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise StorageFault(self._broken.where, self._broken.problem) from self._broken

    def _make_move(self, event: Event, now: float) -> tuple[Effect, ...]:
        before = self.state
        after, effects = handle(before, event, now)
        if after is before and not effects:
            return ()
        if not self._agents.muted:
            self._journal.append(now, event)
            self._meter.moved(before, after, now)
        self.state = after
        if isinstance(event, Ready) and after is not before and before.phase is Phase.TRAINING:
            self._keep_candidate(event)
        if isinstance(event, Uploaded) and self._collection is not None:
            self._collection.counted(event.agent, event.sha256)
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
        if state.phase is Phase.SUMMING and self._collection and self._collection.masking:
            self._collection.masking.repeat(agent)  # the list that it vouches for
        elif not effects and not state.phase.over:
            self._agents.nothing_to_do(agent, state)

    def _is_adding(self, event: Event) -> bool:
        """While an update is on its way into the sum, nothing may close the sum without it."""
        adding = None if self._collection is None else self._collection.sum.adding
        return adding is not None and (
            isinstance(event, Tick) or (isinstance(event, Declined) and event.agent == adding)
        )

    def heard(self, event: KeyShared | Ready | Applied | Declined) -> None:
        """Remember what an agent reports, then move the run."""
        match event:
            case KeyShared():
                grant = self.state.grant
                if grant is None or (event.agent, event.key_id) != (grant.holder, grant.key_id):
                    return
                self._agents.keep_envelopes(grant, dict(event.envelopes))
            case Ready():
                if not self._is_admitted(event):
                    return
                self._reports.ready(self.state, event)
            case Applied():
                share = self._saturated_share(event)
                self._reports.applied(self.state, event, share)
                if self._agents.history and event.round == self._agents.history[-1].round:
                    self._agents.knows(event.agent, len(self._agents.history))
            case Declined():
                self._reports.declined(self.state, event)
        self.post(event)

    def _saturated_share(self, event: Applied) -> float:
        """Return which part of the round's values lay beyond its clip."""
        record = self._agents.history[-1] if self._agents.history else None
        if record is None or record.round != event.round:
            return 0.0
        values = update_length(self.config.training, self._plan.parameter_count)
        share = event.saturated / (values * len(record.slots))
        if share > SATURATION_WARNING:
            self._log.warning(
                "updates saturated: their values beyond the clip were cut",
                round=event.round,
                agent=event.agent,
                share=round(share, 5),
            )
        return share

    def _is_admitted(self, event: Ready) -> bool:
        """Under masks, an agent is ready once its keys for the next cohort are verified."""
        masked = self.config.encoding.protection.has_masks
        if not masked or self.state.phase is not Phase.TRAINING:
            return True
        attempt = cohort.AttemptId(self.run_id, self.state.round, self.state.attempt + 1)
        try:
            identity = control_pb2.IdentityKey.FromString(event.identity)
            read_candidate(event.agent, attempt, event.advertisement, identity, self._authority)
        except Refused as refused:
            self.refuse(event.agent, refused)
            self.post(Declined(event.agent, event.round, refused.reason))
            return False
        return True

    def _keep_candidate(self, event: Ready) -> None:
        if self.config.encoding.protection.has_masks:
            identity = control_pb2.IdentityKey.FromString(event.identity)
            self._candidates[event.agent] = known_candidate(event.advertisement, identity)

    def heard_mask_step(self, agent: str, message: bytes) -> None:
        """Carry on what a member says in its cohort's protocol."""
        masking = None if self._collection is None else self._collection.masking
        if masking is None:
            self.refuse(agent, Refused(Reason.WRONG_ROUND, "expected no mask step: no cohort"))
            return
        try:
            masking.heard(agent, message)
        except Refused as refused:
            self.refuse(agent, refused)

    def heard_progress(self, agent: str, round_number: int, share: float) -> None:
        """Remember how far an agent's training is."""
        self._reports.progress(self.state, agent, round_number, share)

    # uploads

    def upload_path(self, upload: Upload) -> Path | None:
        """Return where to spool the upload; None when it is counted; raises Refused."""
        self._require_whole()
        state = self.state
        if upload.kind is UploadKind.OPENED_SUM:
            return self._returned_sum().path_for(upload, state)
        late = state.phase is not Phase.COLLECTING and upload.agent not in state.uploaded
        if self._collection is None or late:
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected no upload in round {state.round}, {state.phase.value}",
            )
        if upload.agent in state.excluded:
            raise Refused(Reason.NOT_IN_COHORT, "expected a member that did not decline the round")
        return self._collection.sum.path_for(upload)

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Add the spooled update to the sum; raises Refused and leaves nothing."""
        accept = self._take_back if upload.kind is UploadKind.OPENED_SUM else self._count
        accepting = asyncio.create_task(accept(upload, path))
        self._counting.add(accepting)  # the loop itself keeps only weak references
        accepting.add_done_callback(self._counting.discard)
        # To the end even when the agent is cut meanwhile: what is in the sum must be counted.
        await asyncio.shield(accepting)

    async def _count(self, upload: Upload, path: Path) -> None:
        """Bring the update into the sum, if it is wanted still; a refused one is deleted."""
        collection = self._collection
        try:
            if collection is None or not await collection.add(upload, path, self.upload_path):
                return
        except Refused:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise
        self._require_whole()
        if collection is not self._collection:
            return  # cancelled, or another attempt: that sum is not wanted any more
        self._log.info("update accepted", agent=upload.agent, bytes=upload.artifact.size_bytes)
        self.post(Uploaded(upload.agent, upload.artifact.sha256))

    async def _take_back(self, upload: Upload, path: Path) -> None:
        """Keep an opened sum that is the one that the agents agree on."""
        try:
            opened = await self._returned_sum().publish(path, self._published)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        if self.upload_path(upload) is not None:  # still wanted?
            self._store.set_opened(self.run_id, upload.round, opened)
            self.post(SumReturned(upload.agent))

    def _returned_sum(self) -> ReturnedSum:
        if not self._agents.history:
            raise Refused(Reason.WRONG_ROUND, "expected no opened sum before the first round")
        record = self._agents.history[-1]
        context = context_of_round(self.run_id, self.config, self._plan, record)
        return ReturnedSum(replace(context, cohort=b""), record.slots, self._spool)

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
                self._agents.ask_for_key(grant)
            case Invite(agents):
                self._invite(agents, before, now)
            case OpenCohort():
                self._open_cohort()
            case RepeatCohort(agent):
                self._repeat_cohort(agent)
            case CloseCohort():
                self._close_cohort()
            case PublishResult(agents):
                self._agents.result(agents)
            case AskForSum(agent):
                self._agents.ask_for_sum(agent, self.state.round)
            case AbandonRound():
                self._log.warning("round abandoned", round=before.round)
                self._discard_sum()
            case CloseRound():
                self._close_round(before.round, now)
            case FinishRun():
                self._finish()
            case Reject(agent, reason, subject):
                self.refuse(agent, Refused(reason, subject))

    def _record_rotation(self, grant: Grant) -> None:
        if grant.fresh and not self._agents.muted:
            run, key = self.run_id.hex(), grant.key_id
            self._audit.append(f"agent {grant.holder}", Action.RUN_KEY_ROTATED, run, key_id=key)

    def _invite(self, agents: frozenset[str], before: RunState, now: float) -> None:
        # A repeated invitation keeps the deadline: the round goes on, it does not start anew.
        state = self.state
        if state.phase is Phase.TRAINING and before.deadline != state.deadline:
            self._round_started = now
            self._reports.open_round()
            self._log.info("round started", round=state.round, invited=len(agents))
            others = state.connected - agents
            self._agents.waiting(others, state, control_pb2.WAIT_CAUSE_NOT_SELECTED)
        masked = self.config.encoding.protection.has_masks
        if masked and state.phase is Phase.COLLECTING:
            return  # an invitation is for the next attempt: joining it gives this one up
        self._agents.invite(agents, state, self._seconds_left())

    def _open_cohort(self) -> None:
        state = self.state
        self._discard_sum()
        masking = self._open_masking()
        digest = b"" if masking is None else masking.cohort.digest
        context = context_of_cohort(self.run_id, self.config, self._plan, state, digest)
        spool = self._spool / f"{state.round}.{state.attempt}"
        protection = self.config.encoding.protection
        self._collection = Collection(
            context, protection, state.cohort, spool, masking, self._metrics, self._crypto_processes
        )
        self._agents.cohort(state.cohort, state, self._collection, self._seconds_left())
        late = state.invited - set(state.cohort)
        self._agents.waiting(late, state, control_pb2.WAIT_CAUSE_ROUND_CLOSED)

    def _open_masking(self) -> Masking | None:
        """Begin the cohort's protocol for masks, where there are any."""
        state = self.state
        if not self.config.encoding.protection.has_masks:
            return None
        return Masking(
            cohort.AttemptId(self.run_id, state.round, state.attempt),
            state.policy.minimum_agents,
            {agent: self._candidates[agent] for agent in state.cohort},
            self._send_mask_step,
            self._remember_mask_step,
            self._metrics,
        )

    def _send_mask_step(self, agent: str, message: bytes) -> None:
        self._agents.mask_step(agent, self.state.round, message)

    def _remember_mask_step(self, agent: str, message: bytes) -> None:
        if self._agents.muted:
            return
        try:
            self._journal.append(self._clock.now(), MaskMessage(agent, message))
        except StorageFault as fault:
            self.abandon(fault)
            raise

    def _repeat_cohort(self, agent: str) -> None:
        collection = self._collection
        if collection is None:
            raise AssertionError("a cohort is repeated only while it is open")
        self._agents.cohort([agent], self.state, collection, self._seconds_left())
        if collection.masking is not None:
            collection.masking.repeat(agent)

    def _close_cohort(self) -> None:
        collection, state = self._collection, self.state
        if collection is None:
            raise AssertionError("a cohort is closed only after it was opened")
        self._agents.accepted(state, collection.sum.slots)
        collection.close()
        if not self._agents.muted:
            self._storing = asyncio.create_task(self._store_sum())

    async def _store_sum(self) -> None:
        """Publish the sum and make it history, before anyone is told of it."""
        collection = self._collection
        if collection is None:
            raise AssertionError("a sum is stored only after its cohort was closed")
        seconds = self.config.deadlines.upload
        record = await collection.stored(self.state, self._published, seconds)
        if collection is not self._collection:
            return  # the run was cancelled meanwhile
        if record is None:
            self.post(SumFailed())
            return
        self._store.add_round(self.run_id, record)
        self._agents.history = (*self._agents.history, record)
        self.post(SumStored())
        await asyncio.to_thread(collection.sum.discard)

    def _discard_sum(self) -> None:
        if self._collection is not None:
            self._collection.sum.discard()
        self._collection = None

    def _close_round(self, number: int, now: float) -> None:
        seconds = now - self._round_started
        self._reports.close_round(number, seconds)
        self._discard_sum()
        self._candidates.clear()
        self._journal.restart(now, self.state)
        self._log.info("round finished", round=number, seconds=round(seconds, 3))

    def _finish(self) -> None:
        state = self.state
        self._discard_sum()
        self._agents.finished(state)
        reason = None if state.reason is None else state.reason.name
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
        self._agents.refuse(agent, self.state.round, refused)

    def _seconds_left(self) -> float:
        return max(0.0, self.state.deadline - self._clock.now())


def _place(state: RunState) -> tuple[Phase, int, int]:
    return state.phase, state.round, state.attempt
