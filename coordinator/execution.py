"""One run being executed: events go into the state machine, its effects come out as I/O.

Everything but the arithmetic of sums happens on the event loop's thread, so that an event is
handled, remembered and acted upon before the next one is looked at. What changed the state is in
the journal first: a coordinator that is killed replays it and goes on.
"""

import asyncio
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path

import structlog
from cryptography import x509

import crypto
from coordinator import announcements
from coordinator.clock import Clock
from coordinator.collection import Collection
from coordinator.config import RunConfig
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
from coordinator.journal import Journal, MaskMessage
from coordinator.masking import Candidate, Masking, known_candidate, read_candidate
from coordinator.published import Published
from coordinator.reports import RoundReports
from coordinator.returned_sum import ReturnedSum
from coordinator.round_sum import Upload, UploadKind
from coordinator.rounds import handle
from coordinator.run_keys import Grant
from coordinator.run_state import Phase, RunState, Wish
from coordinator.sessions import Sessions
from coordinator.store import RunRecord, Store
from crypto import cohort
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.terms import clip_of
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
    ) -> None:
        self.run_id = record.run_id
        self.config = config
        self.finished = asyncio.Event()
        self._record = record
        self._plan = plan
        self._store = store
        self._sessions = sessions
        self._published = published
        self._spool = spool / record.run_id.hex()
        self._authority = authority
        self._clock = Clock()
        self._journal = Journal(store, record.run_id)
        self._candidates: dict[str, Candidate] = {}  # under masks: agents that said READY
        self._collection: Collection | None = None
        self._history = store.rounds(record.run_id)
        self._envelopes = store.envelopes(record.run_id)
        self._counting: set[asyncio.Task[None]] = set()
        self._storing: asyncio.Task[None] | None = None
        self._known_rounds: dict[str, int] = {}  # agent -> rounds that its state surely includes
        self._round_started = 0.0
        self._replaying = False
        self._reports = RoundReports(store, record.run_id)
        self._log = _log.bind(run=record.name)
        self.state = RunState(config.policy, self._clock.now() + config.policy.gathering_seconds)

    # starting and starting again

    async def open(self, connected: Set[str]) -> None:
        """Take up the run where the journal leaves it, with those who are here."""
        resumed = self._replay()
        if resumed:
            self._log.info("run resumed", round=self.state.round, phase=self.state.phase.value)
        else:
            self._journal.restart(self._clock.now(), self.state)
        if self._collection is not None and self.state.phase in (Phase.COLLECTING, Phase.SUMMING):
            await self._restore(self._collection)
        # They come as one: else the round would begin with the first `minimum` of them.
        self.post(TakenUp(frozenset(connected)))

    def _replay(self) -> bool:
        """Repeat what the journal says, without telling anyone; False when it is empty."""
        sessions, self._sessions = self._sessions, Sessions()
        self._replaying = True
        empty = True
        for at, happened in self._journal.read():
            empty = False
            match happened:
                case RunState():
                    self.state = replace(happened, policy=self.config.policy)
                case MaskMessage(agent, message):
                    self.heard_mask_step(agent, message)
                case _:
                    self._move(happened, at)
        self._sessions = sessions
        self._replaying = False
        return not empty

    async def _restore(self, collection: Collection) -> None:
        """Build the open sum again from the spool, and go on with storing it."""
        if not await collection.restore(self.state.uploaded):
            self.post(SumFailed())
        elif self.state.phase is Phase.SUMMING:
            if self._history and self._history[-1].round == self.state.round:
                self.post(SumStored())
            else:
                self._storing = asyncio.create_task(self._store_sum())

    def check(self) -> None:
        """Raise what broke the sum's storing: a run that cannot go on must not seem to wait."""
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
            self._known_rounds.pop(event.agent, None)  # it may have lost what it had
        effects = self._move(event, self._clock.now())
        if isinstance(event, AgentConnected):
            self._welcome(event.agent, effects)
        elif isinstance(event, TakenUp):
            for agent in sorted(event.agents):
                self._welcome(agent, effects)

    def _move(self, event: Event, now: float) -> tuple[Effect, ...]:
        before = self.state
        after, effects = handle(before, event, now)
        if after is before and not effects:
            return ()
        if not self._replaying:
            self._journal.append(now, event)
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
            self._tell([agent], self._waiting(_wait_cause(state, agent)))

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
                envelopes = {
                    recipient: envelope
                    for recipient, envelope in event.envelopes.items()
                    if recipient in grant.recipients
                }
                self._store.put_envelopes(self.run_id, event.key_id, envelopes)
                self._envelopes.setdefault(event.key_id, {}).update(envelopes)
            case Ready():
                if not self._is_admitted(event):
                    return
                self._reports.ready(self.state, event)
            case Applied():
                share = self._saturated_share(event)
                self._reports.applied(self.state, event, share)
                if self._history and event.round == self._history[-1].round:
                    self._known_rounds[event.agent] = len(self._history)
            case Declined():
                self._reports.declined(self.state, event)
        self.post(event)

    def _saturated_share(self, event: Applied) -> float:
        """Return which part of the round's values lay beyond its clip."""
        record = self._history[-1] if self._history else None
        if record is None or record.round != event.round:
            return 0.0
        share = event.saturated / (self._plan.parameter_count * len(record.slots))
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
            if collection is None or not await collection.add(upload, path):
                return
        except Refused:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise
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
        if not self._history:
            raise Refused(Reason.WRONG_ROUND, "expected no opened sum before the first round")
        record = self._history[-1]
        context = self._context(record.attempt, record.weight_cap, record.clip, b"")
        return ReturnedSum(replace(context, round=record.round), record.slots, self._spool)

    def count_traffic(self, agent: str, sent: int, received: int) -> None:
        """Count payload bytes of the agent's artifacts towards the round."""
        self._reports.count_traffic(agent, sent, received)

    # effects

    def _perform(  # noqa: C901 - one arm per effect
        self, effect: Effect, before: RunState, now: float
    ) -> None:
        match effect:
            case ShareKey(grant):
                self._share_key(grant)
            case Invite(agents):
                self._invite(agents, before, now)
            case OpenCohort():
                self._open_cohort()
            case RepeatCohort(agent):
                self._repeat_cohort(agent)
            case CloseCohort():
                self._close_cohort()
            case PublishResult(agents):
                self._tell(agents, announcements.result(self.run_id, self._history[-1]))
            case AskForSum(agent):
                self._tell([agent], announcements.return_sum(self.run_id, self.state.round))
            case AbandonRound():
                self._log.warning("round abandoned", round=before.round)
                self._discard_sum()
            case CloseRound():
                self._close_round(before.round, now)
            case FinishRun():
                self._finish()
            case Reject(agent, reason, subject):
                self.refuse(agent, Refused(reason, subject))

    def _share_key(self, grant: Grant) -> None:
        recipients = {}
        for agent in grant.recipients:
            session = self._sessions.get(agent)
            if session is not None and session.exchange_key is not None:
                recipients[agent] = session.exchange_key
        envelope = None if grant.fresh else self._envelopes[grant.key_id][grant.holder]
        request = announcements.wrap_key(self.run_id, grant.key_id, recipients, envelope)
        self._log.info("run key asked", key_id=grant.key_id, fresh=grant.fresh)
        self._tell([grant.holder], request)

    def _invite(self, agents: frozenset[str], before: RunState, now: float) -> None:
        # A repeated invitation keeps the deadline: the round goes on, it does not start anew.
        if self.state.phase is Phase.TRAINING and before.deadline != self.state.deadline:
            self._round_started = now
            self._reports.open_round()
            self._log.info("round started", round=self.state.round, invited=len(agents))
            others = self.state.connected - agents
            self._tell(others, self._waiting(control_pb2.WAIT_CAUSE_NOT_SELECTED))
        masked = self.config.encoding.protection.has_masks
        if masked and self.state.phase is Phase.COLLECTING:
            return  # an invitation is for the next attempt: joining it gives this one up
        for agent in agents:
            self._tell([agent], self._invitation(agent))

    def _invitation(self, agent: str) -> announcements.Message:
        history = self._history[self._known_rounds.get(agent, 0) :]
        needed = {record.key_id for record in history} | {self.state.keys.latest}
        return announcements.invitation(
            self.run_id,
            self.config,
            self._record.plan,
            self.state,
            history,
            [
                envelopes[agent]
                for key_id, envelopes in sorted(self._envelopes.items())
                if key_id in needed and agent in envelopes
            ],
            self._seconds_left(),
        )

    def _open_cohort(self) -> None:
        state = self.state
        self._discard_sum()
        masking = self._open_masking()
        digest = b"" if masking is None else masking.cohort.digest
        context = self._context(state.attempt, state.weight_cap, self._clip(), digest)
        spool = self._spool / f"{state.round}.{state.attempt}"
        protection = self.config.encoding.protection
        self._collection = Collection(context, protection, state.cohort, spool, masking)
        self._tell(state.cohort, self._cohort(self._collection))
        late = state.invited - set(state.cohort)
        self._tell(late, self._waiting(control_pb2.WAIT_CAUSE_ROUND_CLOSED))

    def _clip(self) -> float:
        """Return the range of the cohort's values; see `Cohort.clip`."""
        encoding = self.config.encoding
        if self.state.clip and not encoding.clip:
            return self.state.clip
        return clip_of(encoding, self.config.training, self.state.weight_cap)

    def _context(
        self, attempt: int, weight_cap: int, clip: float, digest: bytes
    ) -> crypto.UpdateContext:
        return crypto.UpdateContext(
            run_id=self.run_id,
            round=self.state.round,
            attempt=attempt,
            parameter_count=self._plan.parameter_count,
            capacity=self.config.encoding.capacity,
            weight_cap=weight_cap,
            clip=clip,
            update_bits=self.config.encoding.update_bits,
            cohort=digest,
        )

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
        )

    def _send_mask_step(self, agent: str, message: bytes) -> None:
        self._tell([agent], announcements.mask_step(self.run_id, self.state.round, message))

    def _remember_mask_step(self, agent: str, message: bytes) -> None:
        if not self._replaying:
            self._journal.append(self._clock.now(), MaskMessage(agent, message))

    def _cohort(self, collection: Collection) -> announcements.Message:
        return announcements.cohort(
            self.run_id,
            self.state,
            collection.context.clip,
            self._seconds_left(),
            collection.masking,
        )

    def _repeat_cohort(self, agent: str) -> None:
        collection = self._collection
        if collection is None:
            raise AssertionError("a cohort is repeated only while it is open")
        self._tell([agent], self._cohort(collection))
        if collection.masking is not None:
            collection.masking.repeat(agent)

    def _close_cohort(self) -> None:
        collection, state = self._collection, self.state
        if collection is None:
            raise AssertionError("a cohort is closed only after it was opened")
        slots = collection.sum.slots
        self._tell(state.cohort, announcements.accepted(self.run_id, state, slots))
        collection.close()
        if not self._replaying:
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
        self._history = (*self._history, record)
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
        message = announcements.finished(self.run_id, state.phase, state.reason, self._history)
        self._tell(state.connected, message)
        reason = None if state.reason is None else state.reason.name
        self._log.info("run finished", phase=state.phase.value, reason=reason)
        self._journal.clear()
        self.finished.set()

    def refuse(self, agent: str, refused: Refused) -> None:
        """Tell an agent that its step is refused."""
        self._known_rounds.pop(agent, None)  # a diverged one starts from the plan again
        self._log.info("step refused", agent=agent, reason=refused.reason.name)
        self._tell([agent], announcements.refusal(self.run_id, self.state.round, refused))

    def _waiting(self, cause: control_pb2.WaitCause.ValueType) -> announcements.Message:
        return announcements.waiting(cause, self.run_id, self.state.round)

    def _tell(self, agents: Iterable[str], message: announcements.Message) -> None:
        for agent in agents:
            self._sessions.send(agent, message)

    def _seconds_left(self) -> float:
        return max(0.0, self.state.deadline - self._clock.now())


def _place(state: RunState) -> tuple[Phase, int, int]:
    return state.phase, state.round, state.attempt


def _wait_cause(state: RunState, agent: str) -> control_pb2.WaitCause.ValueType:
    if state.phase is Phase.GATHERING:
        return control_pb2.WAIT_CAUSE_PAUSED if state.paused else control_pb2.WAIT_CAUSE_GATHERING
    if agent in state.invited and agent not in state.ready:
        return control_pb2.WAIT_CAUSE_ROUND_CLOSED
    return control_pb2.WAIT_CAUSE_NOT_SELECTED
