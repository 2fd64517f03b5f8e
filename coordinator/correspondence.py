"""What the agents of one run are told, and what of it follows from what they were told before."""

from collections.abc import Iterable, Mapping, Set

from coordinator import announcements
from coordinator.collection import Collection
from coordinator.config import RunConfig
from coordinator.facilities import Facilities
from coordinator.run_keys import Grant
from coordinator.run_state import Phase, RunState
from coordinator.store import RoundRecord, RunRecord
from fedloom.errors import Refused
from fedloom.v1 import control_pb2


class Correspondence:
    """Writes to the agents of one run; those who are away are told when they connect again."""

    def __init__(self, record: RunRecord, config: RunConfig, facilities: Facilities) -> None:
        store = facilities.store
        self.history: tuple[RoundRecord, ...] = store.rounds(record.run_id)
        self.muted = False  # while a journal is replayed: it was said before
        self._record = record
        self._config = config
        self._store = store
        self._sessions = facilities.sessions
        self._steering = facilities.steering
        self._envelopes = store.envelopes(record.run_id)  # run keys, wrapped, by number and agent
        self._known_rounds: dict[str, int] = {}  # agent -> rounds that its state surely includes

    def knows(self, agent: str, rounds: int) -> None:
        """Remember how much of the history an agent has."""
        self._known_rounds[agent] = rounds

    def forget(self, agent: str) -> None:
        """Take an agent to know nothing: it may have lost what it had."""
        self._known_rounds.pop(agent, None)

    def keep_envelopes(self, grant: Grant, envelopes: dict[str, bytes]) -> None:
        """Keep a wrapped key for those whom it was asked for."""
        wanted = {agent: e for agent, e in envelopes.items() if agent in grant.recipients}
        self._store.put_envelopes(self._record.run_id, grant.key_id, wanted)
        self._envelopes.setdefault(grant.key_id, {}).update(wanted)

    def ask_for_key(self, grant: Grant) -> None:
        """Ask the holder to wrap a key."""
        if self.muted:
            return
        recipients = {}
        for agent in grant.recipients:
            session = self._sessions.get(agent)
            if session is not None and session.exchange_key is not None:
                recipients[agent] = session.exchange_key
        envelope = None if grant.fresh else self._envelopes[grant.key_id][grant.holder]
        run_id = self._record.run_id
        request = announcements.wrap_key(run_id, grant.key_id, recipients, envelope)
        self._tell([grant.holder], request)

    def invite(self, agents: Iterable[str], state: RunState, seconds_left: float) -> None:
        """Invite agents to the state's round, each with the history and the keys that it lacks."""
        for agent in () if self.muted else agents:
            history = self.history[self._known_rounds.get(agent, 0) :]
            latest = state.keys.latest
            envelopes = envelopes_for(agent, self._envelopes, history, latest)
            message = announcements.invitation(
                self._record.run_id,
                self._config,
                self._record.plan,
                state,
                history,
                envelopes,
                seconds_left,
            )
            self._tell([agent], message)

    def cohort(
        self, agents: Iterable[str], state: RunState, collection: Collection, seconds_left: float
    ) -> None:
        """Tell members who takes part."""
        run_id, clip = self._record.run_id, collection.context.clip
        message = announcements.cohort(run_id, state, clip, seconds_left, collection.masking)
        self._tell(agents, message)

    def mask_step(self, agent: str, round_number: int, message: bytes) -> None:
        """Carry a message of the cohort's protocol."""
        self._tell([agent], announcements.mask_step(self._record.run_id, round_number, message))

    def accepted(self, state: RunState, slots: tuple[int, ...]) -> None:
        """Tell the members which updates are in the sum."""
        if not self.muted:
            message = announcements.accepted(self._record.run_id, state, slots)
            self._tell(state.cohort, message)

    def result(self, agents: Iterable[str]) -> None:
        """Tell where the newest sum is."""
        self._tell(agents, announcements.result(self._record.run_id, self.history[-1]))

    def ask_for_sum(self, agent: str, round_number: int) -> None:
        """Ask for the opened sum."""
        self._tell([agent], announcements.return_sum(self._record.run_id, round_number))

    def waiting(
        self, agents: Iterable[str], state: RunState, cause: control_pb2.WaitCause.ValueType
    ) -> None:
        """Tell agents why nothing is asked of them."""
        for agent in agents:
            self._wait(agent, state, cause, 0)

    def dismiss(self, agents: Set[str], state: RunState, now: float) -> None:
        """Tell agents that a round has not invited, and send away whom the next needs neither."""
        away = {} if self.muted else self._steering.dismissed(agents, state, now)
        for agent, seconds in away.items():
            self._wait(agent, state, control_pb2.WAIT_CAUSE_NOT_SELECTED, seconds)

    def _wait(
        self, agent: str, state: RunState, cause: control_pb2.WaitCause.ValueType, away: int
    ) -> None:
        spread = 0 if self.muted else self._steering.fleet.spread_seconds
        run_id = self._record.run_id
        self._tell([agent], announcements.waiting(cause, run_id, state.round, away, spread))

    def nothing_to_do(self, agent: str, state: RunState, now: float) -> None:
        """Tell an agent that came why nothing is asked of it, and whether to come back later."""
        cause = control_pb2.WAIT_CAUSE_NOT_SELECTED
        if state.phase is Phase.GATHERING:
            cause = control_pb2.WAIT_CAUSE_GATHERING
            if state.paused:
                cause = control_pb2.WAIT_CAUSE_PAUSED
        elif state.policy.is_asynchronous:
            pass  # what it trains is wanted in a later round
        elif agent in state.invited and agent not in state.ready:
            cause = control_pb2.WAIT_CAUSE_ROUND_CLOSED
        away = 0 if self.muted else self._steering.arrival(agent, state, now)
        self._wait(agent, state, cause, away)

    def finished(self, state: RunState) -> None:
        """Tell everybody how the run ended."""
        run_id = self._record.run_id
        for agent in () if self.muted else state.connected:
            envelopes = envelopes_for(agent, self._envelopes, self.history)
            message = announcements.finished(
                run_id, state.phase, state.reason, self.history, envelopes
            )
            self._tell([agent], message)

    def refuse(self, agent: str, round_number: int, refused: Refused) -> None:
        """Tell an agent that its step is refused; a diverged one starts from the plan again."""
        self.forget(agent)
        self._tell([agent], announcements.refusal(self._record.run_id, round_number, refused))

    def _tell(self, agents: Iterable[str], message: announcements.Message) -> None:
        for agent in () if self.muted else agents:
            self._sessions.send(agent, message)


def envelopes_for(
    agent: str,
    envelopes: Mapping[int, Mapping[str, bytes]],
    history: Iterable[RoundRecord],
    latest: int = 0,
) -> list[bytes]:
    """Return the wrapped keys with which an agent opens the history, and the latest one.

    `envelopes` are the run's, by number of the key and agent.
    """
    needed = {record.key_id for record in history} | {latest}
    return [
        by_agent[agent]
        for key_id, by_agent in sorted(envelopes.items())
        if key_id in needed and agent in by_agent
    ]
