"""What a conductor did and stored, and therefore what a run may not ask of it any more."""

from dataclasses import dataclass, field

from coordinator.events import (
    AbandonRound,
    AskForSum,
    CloseCohort,
    CloseRound,
    Effect,
    FinishRun,
    Invite,
    OpenCohort,
    PublishResult,
    Reject,
    RepeatCohort,
    ShareKey,
)
from coordinator.run_state import Phase, RunState


@dataclass
class Record:
    """The laws of effects: each is checked against everything before it."""

    cohorts: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    stored: int = 0  # number of the last round whose sum is in the history
    closed: set[int] = field(default_factory=set)
    envelopes: dict[int, set[str]] = field(default_factory=dict)  # recipients by key
    used_keys: set[int] = field(default_factory=set)  # that sums are encrypted under
    finished: int = 0

    def keep(self, before: RunState, after: RunState, effect: Effect) -> None:
        """Check an effect of the step from `before` to `after`, and remember it."""
        match effect:
            case Invite() | ShareKey():
                self._keep_invitation(after, effect)
            case OpenCohort() | CloseCohort():
                self._keep_cohort(after, effect)
            case CloseRound() | AbandonRound():
                self._keep_round(before, after, effect)
            case FinishRun():
                self.finished += 1
            case PublishResult(told):
                assert told <= after.appliers & after.connected
            case AskForSum(agent):
                assert after.applied[agent] == after.agreed
                assert agent in after.connected
            case RepeatCohort(member):
                assert member in after.cohort
            case Reject():
                assert effect.subject.startswith("expected ")

    def _keep_invitation(self, after: RunState, effect: Invite | ShareKey) -> None:
        if isinstance(effect, Invite):
            assert effect.agents <= after.invited
            assert not after.paused or after.phase is not Phase.GATHERING
            if after.policy.needs_key:
                for key_id in {*self.used_keys, after.keys.latest}:
                    assert effect.agents <= self.envelopes[key_id]
            return
        grant = effect.grant
        assert grant.holder in after.connected
        if grant.fresh:
            assert grant.key_id not in self.envelopes, "an abandoned key's envelopes would mix in"
            self.envelopes[grant.key_id] = set()
        else:
            assert grant.holder in self.envelopes[grant.key_id]

    def _keep_cohort(self, after: RunState, effect: OpenCohort | CloseCohort) -> None:
        if isinstance(effect, OpenCohort):
            past = [attempt for number, attempt in self.cohorts if number == after.round]
            assert after.attempt > max(past, default=0)
            assert not set(after.cohort) & set(after.excluded)
            self.cohorts[after.round, after.attempt] = after.cohort
        assert after.policy.minimum_agents <= len(self.cohorts[after.round, after.attempt])
        if isinstance(effect, CloseCohort):
            assert after.policy.minimum_agents <= len(after.uploaded)
            assert set(after.uploaded) <= set(self.cohorts[after.round, after.attempt])

    def _keep_round(
        self, before: RunState, after: RunState, effect: CloseRound | AbandonRound
    ) -> None:
        assert before.round not in self.closed
        if isinstance(effect, CloseRound):
            assert before.phase in (Phase.APPLYING, Phase.RETURNING)
            assert before.round == self.stored
            assert after.completed == before.completed + 1
            self.closed.add(before.round)
        else:
            assert not before.phase.over
            assert before.round > self.stored or after.reason is not None
            assert after.completed == before.completed
