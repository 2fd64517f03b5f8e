"""One run being executed: events go into the state machine, its effects come out as I/O.

Everything but the arithmetic of sums happens on the event loop's thread, so that an event is
handled, remembered and acted upon before the next one is looked at.
"""

import asyncio
import time
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path

import structlog
from cryptography import x509

import crypto
from coordinator import announcements
from coordinator.config import RunConfig
from coordinator.events import (
    AbandonRound,
    AgentConnected,
    Applied,
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
    SumStored,
    Tick,
    Uploaded,
)
from coordinator.masking import Candidate, Masking, read_candidate
from coordinator.published import Published
from coordinator.reports import RoundReports
from coordinator.round_sum import RoundSum, Upload
from coordinator.rounds import handle
from coordinator.run_state import Phase, RunState
from coordinator.sessions import Sessions
from coordinator.store import RoundRecord, RunRecord, Store
from crypto import cohort
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.terms import clip_of

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
        self._candidates: dict[str, Candidate] = {}  # under masks: agents that said READY
        self._masking: Masking | None = None
        self._history = store.rounds(record.run_id)
        self._envelopes = store.envelopes(record.run_id, record.key_id)
        self._sum: RoundSum | None = None
        self._one_by_one = asyncio.Lock()
        self._counting: set[asyncio.Task[None]] = set()
        self._storing: asyncio.Task[None] | None = None
        self._key_id = record.key_id
        self._known_rounds: dict[str, int] = {}  # agent -> rounds that its state surely includes
        self._round_started = 0.0
        self._reports = RoundReports(store, record.run_id)
        self._log = _log.bind(run=record.name)
        self.state = self._restored()

    def _restored(self) -> RunState:
        """Continue after the history's last round; an attempt that was announced is spent."""
        policy = self.config.policy
        number = len(self._history) + 1
        spent = self._record.attempt if self._record.round == number else 0
        deadline = time.monotonic() + policy.gathering_seconds
        return RunState(
            policy,
            deadline,
            round=number,
            attempt=spent,
            key_holders=frozenset(self._envelopes),
        )

    def start(self, connected: Set[str]) -> None:
        """Take up the run with those who are here; one whose last round is stored is complete.

        They come as one: else the round would begin with the first `minimum` of them.
        """
        if self.state.round > self.config.rounds:
            self._store.update_run(self.run_id, Phase.COMPLETED, self.config.rounds, 0)
            self.state = replace(self.state, phase=Phase.COMPLETED, connected=frozenset(connected))
            self._finish()
        elif connected:
            self.state = replace(self.state, connected=frozenset(connected))
            self.post(AgentConnected(min(connected)))

    def check(self) -> None:
        """Raise what broke the sum's storing: a run that cannot go on must not seem to wait."""
        if self._storing is not None and self._storing.done():
            self._storing.result()

    # events

    def post(self, event: Event) -> None:
        """Move the run by one event: first what must be remembered, then what must be done."""
        if self._is_adding(event):
            return
        if isinstance(event, AgentConnected):
            self._known_rounds.pop(event.agent, None)  # it may have lost what it had
        before = self.state
        self.state, effects = handle(before, event, time.monotonic())
        after = self.state
        if (before.phase, before.round, before.attempt) != (
            after.phase,
            after.round,
            after.attempt,
        ):
            self._store.update_run(
                self.run_id, after.phase, after.round, after.attempt, after.reason
            )
            self._log.info("run moved", phase=after.phase.value, round=after.round)
        for effect in effects:
            self._perform(effect, before)
        if isinstance(event, AgentConnected) and after.phase is Phase.SUMMING and self._masking:
            self._masking.repeat(event.agent)  # it may have missed the list that it vouches for

    def _is_adding(self, event: Event) -> bool:
        """While an update is on its way into the sum, nothing may close the sum without it."""
        adding = None if self._sum is None else self._sum.adding
        return adding is not None and (
            isinstance(event, Tick) or (isinstance(event, Declined) and event.agent == adding)
        )

    def heard(self, event: KeyShared | Ready | Applied | Declined) -> None:
        """Remember what an agent reports, then move the run."""
        match event:
            case KeyShared():
                if event.key_id != self._key_id or event.agent != self.state.key_asked:
                    return
                self._store.put_envelopes(self.run_id, event.key_id, list(event.envelopes.items()))
                self._envelopes = self._store.envelopes(self.run_id, event.key_id)
            case Ready():
                if not self._is_admitted(event):
                    return
                self._reports.ready(self.state, event)
            case Applied():
                self._reports.applied(self.state, event)
                if event.round == len(self._history):
                    self._known_rounds[event.agent] = event.round
            case Declined():
                self._reports.declined(self.state, event)
        self.post(event)

    def _is_admitted(self, event: Ready) -> bool:
        """Under masks, an agent is ready once its keys for the next cohort are verified."""
        masked = self.config.encoding.protection.has_masks
        if not masked or self.state.phase is not Phase.TRAINING:
            return True
        attempt = cohort.AttemptId(self.run_id, self.state.round, self.state.attempt + 1)
        try:
            self._candidates[event.agent] = read_candidate(
                event.agent, attempt, event.advertisement, event.identity, self._authority
            )
        except Refused as refused:
            self.refuse(event.agent, refused)
            self.post(Declined(event.agent, event.round, refused.reason))
            return False
        return True

    def heard_mask_step(self, agent: str, message: bytes) -> None:
        """Carry on what a member says in its cohort's protocol."""
        if self._masking is None:
            self.refuse(agent, Refused(Reason.WRONG_ROUND, "expected no mask step: no cohort"))
            return
        try:
            self._masking.heard(agent, message)
        except Refused as refused:
            self.refuse(agent, refused)

    def heard_progress(self, agent: str, round_number: int, share: float) -> None:
        """Remember how far an agent's training is."""
        self._reports.progress(self.state, agent, round_number, share)

    # uploads

    def upload_path(self, upload: Upload) -> Path | None:
        """Return where to spool the update; None when it is counted; raises Refused."""
        state = self.state
        late = state.phase is not Phase.COLLECTING and upload.agent not in state.uploaded
        if self._sum is None or late:
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected no upload in round {state.round}, {state.phase.value}",
            )
        if upload.agent in state.excluded:
            raise Refused(Reason.NOT_IN_COHORT, "expected a member that did not decline the round")
        return self._sum.path_for(upload)

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Add the spooled update to the sum; raises Refused and leaves nothing."""
        counting = asyncio.create_task(self._count(upload, path))
        self._counting.add(counting)  # the loop itself keeps only weak references
        counting.add_done_callback(self._counting.discard)
        # To the end even when the agent is cut meanwhile: what is in the sum must be counted.
        await asyncio.shield(counting)

    async def _count(self, upload: Upload, path: Path) -> None:
        """Bring one update after another into the sum, if it is wanted still."""
        async with self._one_by_one:
            try:
                if self.upload_path(upload) is None or self._sum is None:
                    return
                await self._sum.add(upload, path)
                size = upload.artifact.size_bytes
                self._log.info("update accepted", agent=upload.agent, bytes=size)
                if self._masking is not None:
                    slot = self.state.cohort.index(upload.agent)
                    self._masking.counted(slot, upload.artifact.sha256)
                self.post(Uploaded(upload.agent, upload.artifact.sha256))
            finally:
                await asyncio.to_thread(path.unlink, missing_ok=True)

    def count_traffic(self, agent: str, sent: int, received: int) -> None:
        """Count payload bytes of the agent's artifacts towards the round."""
        self._reports.count_traffic(agent, sent, received)

    # effects

    def _perform(  # noqa: C901 - one arm per effect
        self, effect: Effect, before: RunState
    ) -> None:
        match effect:
            case ShareKey():
                self._share_key(effect)
            case Invite(agents):
                self._invite(agents, before)
            case OpenCohort():
                self._open_cohort()
            case RepeatCohort(agent):
                self._sessions.send(agent, self._cohort())
                if self._masking is not None:
                    self._masking.repeat(agent)
            case CloseCohort():
                self._storing = asyncio.create_task(self._store_sum())
            case PublishResult(agents):
                self._tell(agents, announcements.result(self.run_id, self._history[-1]))
            case AbandonRound():
                self._log.warning("round abandoned", round=before.round)
                self._discard_sum()
            case CloseRound():
                self._close_round(before.round)
            case FinishRun():
                self._finish()
            case Reject(agent, reason, subject):
                self.refuse(agent, Refused(reason, subject))

    def _share_key(self, effect: ShareKey) -> None:
        if effect.fresh:
            self._key_id = self._store.next_key_id(self.run_id)
            self._envelopes = {}
        recipients = {}
        for agent in effect.recipients:
            session = self._sessions.get(agent)
            if session is not None and session.exchange_key is not None:
                recipients[agent] = session.exchange_key
        envelope = None if effect.fresh else self._envelopes[effect.holder]
        request = announcements.wrap_key(self.run_id, self._key_id, recipients, envelope)
        self._sessions.send(effect.holder, request)

    def _invite(self, agents: frozenset[str], before: RunState) -> None:
        # A repeated invitation keeps the deadline: the round goes on, it does not start anew.
        if self.state.phase is Phase.TRAINING and before.deadline != self.state.deadline:
            self._round_started = time.monotonic()
            self._reports.open_round()
            self._log.info("round started", round=self.state.round, invited=len(agents))
        if self._masking is not None and self.state.phase is Phase.COLLECTING:
            return  # an invitation is for the next attempt: joining it gives this one up
        for agent in agents:
            message = announcements.invitation(
                self.run_id,
                self.config,
                self._record.plan,
                self.state,
                self._history[self._known_rounds.get(agent, 0) :],
                self._envelopes.get(agent),
                self._seconds_left(),
            )
            self._sessions.send(agent, message)

    def _open_cohort(self) -> None:
        state, config = self.state, self.config
        self._discard_sum()
        context = crypto.UpdateContext(
            run_id=self.run_id,
            round=state.round,
            attempt=state.attempt,
            parameter_count=self._plan.parameter_count,
            capacity=config.encoding.capacity,
            weight_cap=state.weight_cap,
            clip=clip_of(config.encoding, config.training, state.weight_cap),
            update_bits=config.encoding.update_bits,
            cohort=self._open_masking(),
        )
        self._sum = RoundSum(context, config.encoding.protection, state.cohort, self._spool)
        self._tell(state.cohort, self._cohort())

    def _open_masking(self) -> bytes:
        """Begin the cohort's protocol for masks, where there are any; return its digest."""
        state = self.state
        if not self.config.encoding.protection.has_masks:
            return b""
        self._masking = Masking(
            cohort.AttemptId(self.run_id, state.round, state.attempt),
            state.policy.minimum_agents,
            {agent: self._candidates[agent] for agent in state.cohort},
            self._send_mask_step,
        )
        return self._masking.cohort.digest

    def _send_mask_step(self, agent: str, message: bytes) -> None:
        step = announcements.mask_step(self.run_id, self.state.round, message)
        self._sessions.send(agent, step)

    def _cohort(self) -> announcements.Message:
        return announcements.cohort(self.run_id, self.state, self._seconds_left(), self._masking)

    async def _store_sum(self) -> None:
        """Publish the sum and make it history, before anyone is told of it."""
        closing, state = self._sum, self.state
        if closing is None:
            raise AssertionError("a cohort is closed only after it was opened")
        slots = closing.slots
        self._tell(state.cohort, announcements.accepted(self.run_id, state, slots))
        correction = None
        if self._masking is not None:
            self._masking.close_uploads()
            correction = await self._masking.settled(self.config.deadlines.upload)
            if correction is None:
                self._log.warning("masks could not be taken out", round=state.round)
                self.post(SumFailed())
                return
        try:
            reference = await asyncio.to_thread(self._published.put, closing.encoded(correction))
        except (OSError, crypto.LocalFault) as error:
            self._log.error("sum failed", error=type(error).__name__)
            self.post(SumFailed())
            return
        record = RoundRecord(
            state.round,
            state.attempt,
            state.weight_cap,
            slots,
            reference,
            cohort_digest=closing.context.cohort,
        )
        self._store.add_round(self.run_id, record)
        self._history = (*self._history, record)
        closing.discard()
        self.post(SumStored())

    def _discard_sum(self) -> None:
        if self._sum is not None:
            self._sum.discard()
        self._sum = None
        self._masking = None

    def _close_round(self, number: int) -> None:
        seconds = time.monotonic() - self._round_started
        self._reports.close_round(number, seconds)
        self._discard_sum()
        self._log.info("round finished", round=number, seconds=round(seconds, 3))

    def _finish(self) -> None:
        state = self.state
        self._discard_sum()
        message = announcements.finished(self.run_id, state.phase, state.reason, self._history)
        self._tell(state.connected, message)
        reason = None if state.reason is None else state.reason.name
        self._log.info("run finished", phase=state.phase.value, reason=reason)
        self.finished.set()

    def refuse(self, agent: str, refused: Refused) -> None:
        """Tell an agent that its step is refused."""
        self._known_rounds.pop(agent, None)  # a diverged one starts from the plan again
        self._log.info("step refused", agent=agent, reason=refused.reason.name)
        self._sessions.send(agent, announcements.refusal(self.run_id, self.state.round, refused))

    def _tell(self, agents: Iterable[str], message: announcements.Message) -> None:
        for agent in agents:
            self._sessions.send(agent, message)

    def _seconds_left(self) -> float:
        return self.state.deadline - time.monotonic()
