"""What a conductor did and stored, and therefore what a run may not ask of it any more."""

from dataclasses import dataclass, field

from coordinator.events import (
    AbandonRound,
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
    stored: int = 0  # rounds whose sum is in the history
    closed: set[int] = field(default_factory=set)
    envelopes: set[str] = field(default_factory=set)  # recipients of the latest run key
    finished: int = 0

    def keep(self, before: RunState, after: RunState, effect: Effect) -> None:
        """Check an effect of the step from `before` to `after`, and remember it."""
        match effect:
            case Invite() | ShareKey():
                self._keep_invitation(after, effect)
            case OpenCohort() | CloseCohort():
                self._keep_cohort(after, effect)
            case CloseRound() | AbandonRound():
                self._keep_round(before, effect)
            case FinishRun():
                self.finished += 1
            case PublishResult(told):
                assert told <= after.invited & after.connected
            case RepeatCohort(member):
                assert member in after.cohort
            case Reject():
                assert effect.subject.startswith("expected ")

    def _keep_invitation(self, after: RunState, effect: Invite | ShareKey) -> None:
        if isinstance(effect, Invite):
            assert effect.agents <= after.invited
            assert not after.policy.needs_key or effect.agents <= self.envelopes
            return
        assert effect.holder in after.connected
        assert effect.holder in self.envelopes or effect.fresh
        if effect.fresh:
            assert not self.stored, "the sums so far need the old key"
            self.envelopes = set()

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

    def _keep_round(self, before: RunState, effect: CloseRound | AbandonRound) -> None:
        assert before.round not in self.closed
        if isinstance(effect, CloseRound):
            assert before.phase is Phase.APPLYING
            assert before.round == self.stored
            self.closed.add(before.round)
        else:
            assert before.phase in (Phase.TRAINING, Phase.COLLECTING, Phase.SUMMING)
            assert before.round > self.stored
