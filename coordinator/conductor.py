"""Executes the queued runs, one after another, and connects the services to the open one."""

import asyncio
import contextlib
import tomllib
from pathlib import Path

import structlog

from coordinator import announcements
from coordinator.config import parse_run_config
from coordinator.correspondence import envelopes_for
from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    AgentRemoved,
    Applied,
    Declined,
    KeyShared,
    Ready,
    Tick,
)
from coordinator.execution import Execution
from coordinator.facilities import Facilities
from coordinator.faults import StorageFault
from coordinator.round_sum import Upload
from coordinator.run_state import Phase, RunState
from coordinator.sessions import Session
from coordinator.store import RunRecord
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.v1 import control_pb2

TICK_SECONDS = 0.5
_log = structlog.get_logger()


class Conductor:
    """What the services talk to."""

    def __init__(self, facilities: Facilities) -> None:
        self._facilities = facilities
        self._store = facilities.store
        self._sessions = facilities.sessions
        self._open: Execution | None = None
        self._settled = False  # whether it is known which run is open, after a start
        facilities.sessions.on_open = self._agent_connected
        facilities.sessions.on_close = self._agent_disconnected

    async def conduct(self, until_idle: bool = False) -> None:
        """Execute runs as they are queued, for ever or until none is left."""
        while True:
            waiting = [run for run in self._store.runs() if not run.phase.over]
            if waiting:
                await self._execute(waiting[0])
            elif until_idle:
                return
            else:
                self._settled = True
                await asyncio.sleep(TICK_SECONDS)

    async def _execute(self, record: RunRecord) -> None:
        try:
            execution = await self._opened(record)
        except (ConfigError, Refused) as error:  # the operator's to mend; other runs go on
            reason = error.reason if isinstance(error, Refused) else Reason.MALFORMED
            _log.warning("run cannot be opened", run=record.name, problem=str(error))
            run_id, number, attempt = record.run_id, record.round, record.attempt
            self._store.update_run(run_id, Phase.FAILED, number, attempt, reason)
            return
        _log.info("run opened", run=record.name, round=execution.state.round)
        try:
            await self._drive(execution)
        except StorageFault as fault:
            execution.abandon(fault)
            self._settled = False
            raise
        finally:
            self._open = None

    async def _drive(self, execution: Execution) -> None:
        await execution.restore()
        self._open, self._settled = execution, True
        protection = execution.config.encoding.protection
        for agent in self._banned_holders(execution.state):
            execution.post(AgentRemoved(agent))
        execution.take_up({s.agent_id: s.traits for s in self._sessions if s.can(protection)})
        while not execution.finished.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(execution.finished.wait(), TICK_SECONDS)
            execution.check()
            execution.obey(self._store.run(execution.run_id).wish)
            execution.post(Tick())

    def _banned_holders(self, state: RunState) -> list[str]:
        """Who has the key of the next round, and was banned while nobody served."""
        holders = state.keys.holders.get(state.keys.latest, frozenset())
        if not holders:
            return []
        agents = self._store.roster.agents()
        return [a.agent_id for a in agents if a.banned_at is not None and a.agent_id in holders]

    async def _opened(self, record: RunRecord) -> Execution:
        """Open a stored run; raises ConfigError or Refused when its file or plan is not right."""
        config = parse_run_config(tomllib.loads(record.config), Path(record.name))
        read_plan = self._facilities.published.read_plan
        plan = await asyncio.to_thread(read_plan, record.plan)
        return Execution(record, config, plan, self._facilities)

    # sessions

    def _agent_connected(self, session: Session) -> None:
        self._tell_what_ended(session)
        run = self._open
        if run is not None and session.can(run.config.encoding.protection):
            run.post(AgentConnected(session.agent_id, session.traits))
        else:
            self._wait_for_a_run(session)

    def _wait_for_a_run(self, session: Session) -> None:
        steering = self._facilities.steering
        away = steering.without_run(session.agent_id, sum(1 for _ in self._sessions))
        spread = steering.fleet.spread_seconds
        cause = control_pb2.WAIT_CAUSE_NO_RUN
        session.send(announcements.waiting(cause, come_back_seconds=away, spread_seconds=spread))

    def _tell_what_ended(self, session: Session) -> None:
        """An agent that was away when its run ended hears of it now."""
        for run in self._store.runs() if session.unfinished_run_ids else ():
            missed = run.run_id in session.unfinished_run_ids and run.phase.over
            if missed and self._store.took_part(run.run_id, session.agent_id):
                history = self._store.rounds(run.run_id)
                keys = self._store.envelopes(run.run_id)
                envelopes = envelopes_for(session.agent_id, keys, history)
                session.send(
                    announcements.finished(run.run_id, run.phase, run.reason, history, envelopes)
                )

    def _agent_disconnected(self, session: Session) -> None:
        if self._open is not None:
            with contextlib.suppress(StorageFault):  # the run is taken up again without the agent
                self._open.post(AgentDisconnected(session.agent_id))

    # operators

    def state_of(self, run_id: bytes) -> RunState | None:
        """Return the run's state while it is open."""
        run = self._run(run_id)
        return None if run is None else run.state

    def open_run(self) -> bytes | None:
        """Return the id of the open run."""
        run = self._open
        return None if run is None else run.run_id

    def remove(self, agent_id: str, refused: Refused) -> None:
        """Go on without an agent, and end its stream with the refusal."""
        if self._open is not None:
            self._open.post(AgentRemoved(agent_id))
        if (session := self._sessions.get(agent_id)) is not None:
            session.send(refused)

    # control

    async def heard(self, run_id: bytes, event: KeyShared | Ready | Applied | Declined) -> None:
        """Hand an agent's step to its run; a step of another run changes nothing.

        Returns when the step was followed: an agent's next one is heard after that.
        """
        if (run := self._run(run_id)) is not None:
            await run.heard(event)
        else:
            _log.info("step of no open run", agent=event.agent, step=type(event).__name__)

    async def heard_mask_step(self, agent: str, run_id: bytes, message: bytes) -> None:
        """Hand on a message of the cohort's protocol for masks."""
        if (run := self._run(run_id)) is not None:
            await run.heard_mask_step(agent, message)

    def heard_progress(self, agent: str, run_id: bytes, round_number: int, share: float) -> None:
        """Hand on how far an agent is."""
        if (run := self._run(run_id)) is not None:
            run.heard_progress(agent, round_number, share)

    # artifacts

    def upload_path(self, upload: Upload) -> Path | None:
        """Return where to spool the update; None when it is counted; raises Refused."""
        return self._run_of(upload).uploads.path_for(upload)

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Have the update validated and counted; raises Refused."""
        await self._run_of(upload).uploads.accept(upload, path)

    def count_traffic(self, agent: str, *, sent: int = 0, received: int = 0) -> None:
        """Count payload bytes towards the open round."""
        if self._open is not None:
            self._open.count_traffic(agent, sent, received)

    def _run(self, run_id: bytes) -> Execution | None:
        run = self._open
        return run if run is not None and run.run_id == run_id else None

    def _run_of(self, upload: Upload) -> Execution:
        run = self._run(upload.run_id)
        if run is None and not self._settled:
            raise Refused(Reason.INTERNAL, "the run is being opened: try again")
        if run is None:
            raise Refused(Reason.WRONG_ROUND, "expected an upload of the open run")
        return run
