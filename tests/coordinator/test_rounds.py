"""The state machine of a run: every arrow of its picture, one example each."""

from dataclasses import replace

from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    Applied,
    CloseCohort,
    CloseRound,
    Declined,
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
    Uploaded,
)
from coordinator.rounds import KEY_SECONDS, MAX_ROUND_FAILURES
from coordinator.run_state import Phase
from fedloom.errors import Reason
from tests.coordinator.samples import OTHER_SHA, SHA, Run, three_in_training

BOTH = frozenset({"a", "b"})


def test_a_round_starts_when_enough_agents_are_here() -> None:
    run = Run()
    assert run.on(AgentConnected("a")) == ()
    assert run.on(AgentConnected("a")) == ()  # the same agent twice is one
    assert run.on(AgentConnected("b")) == (Invite(BOTH),)
    assert run.state.phase is Phase.TRAINING
    assert run.state.deadline == 200


def test_a_round_starts_when_all_hold_the_run_key() -> None:
    run = Run(needs_key=True)
    effects = run.on(AgentConnected("b"), AgentConnected("a"))
    assert effects == (ShareKey("a", BOTH, fresh=True),)
    assert run.on(KeyShared("b", 1, {"a": b"", "b": b""})) == ()  # nobody asked b
    assert run.on(KeyShared("a", 1, {"a": b"", "b": b""})) == (Invite(BOTH),)


def test_a_latecomer_is_given_the_key_by_one_who_holds_it() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), KeyShared("a", 1, {"a": b"", "b": b""}))
    run.on(AgentConnected("c"), Ready("a", 1, 0), Ready("b", 1, 0))
    run.on(Uploaded("a", SHA), Uploaded("b", SHA), SumStored(), Applied("a", 1, SHA))
    effects = run.on(Applied("b", 1, SHA))
    assert effects == (CloseRound(), ShareKey("a", frozenset("c"), fresh=False))
    assert run.on(KeyShared("a", 1, {"c": b""})) == (Invite(frozenset("abc")),)


def test_an_agent_that_wraps_no_key_is_passed_over() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), AgentConnected("c"))
    everyone = frozenset("abc")
    assert run.wait(KEY_SECONDS - 1) == ()
    assert run.wait(1) == (ShareKey("b", everyone - {"a"}, fresh=True),)
    declined = run.on(Declined("b", 0, Reason.KEY_UNAVAILABLE))
    assert declined == ()  # c alone is too few
    assert run.on(AgentConnected("a")) == (ShareKey("a", frozenset("ac"), fresh=True),)
    assert run.on(AgentDisconnected("a")) == ()
    assert run.state.key_asked is None


def test_a_fresh_key_makes_the_old_one_worthless() -> None:
    run = Run(needs_key=True)
    run.state = replace(run.state, key_holders=frozenset("a"))  # a is away
    everyone = frozenset("abc")
    assert run.on(AgentConnected("b"), AgentConnected("c")) == (
        ShareKey("b", everyone - {"a"}, fresh=True),
    )
    assert run.on(AgentConnected("a")) == ()
    late = run.on(KeyShared("b", 2, {"b": b"", "c": b""}))
    assert late == (ShareKey("b", frozenset("a"), fresh=False),)


def test_after_a_round_no_fresh_key_is_made() -> None:
    run = Run(needs_key=True)
    run.state = replace(run.state, round=2, key_holders=frozenset("a"))
    assert run.on(AgentConnected("b"), AgentConnected("c")) == ()
    assert run.on(AgentConnected("a")) == (ShareKey("a", frozenset("bc"), fresh=False),)


def test_who_gets_no_envelope_is_not_invited() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), AgentConnected("c"))
    assert run.on(KeyShared("a", 1, {"a": b"", "c": b""})) == (Invite(frozenset("ac")),)
    assert run.state.excluded == {"b": Reason.KEY_UNAVAILABLE}


def test_too_few_agents_by_the_deadline_fail_the_run() -> None:
    run = Run()
    run.on(AgentConnected("a"))
    assert run.wait(99) == ()
    assert run.wait(1) == (FinishRun(),)
    assert (run.state.phase, run.state.reason) == (Phase.FAILED, Reason.QUORUM_NOT_REACHED)


def test_the_cohort_is_formed_of_those_who_are_ready() -> None:
    run = Run().to(Phase.TRAINING)
    assert run.on(Ready("b", 1, 5)) == ()
    assert run.on(Ready("b", 1, 5)) == ()
    assert run.on(Ready("a", 1, 3)) == (OpenCohort(),)
    assert (run.state.cohort, run.state.attempt, run.state.weight_cap) == (("a", "b"), 1, 32)


def test_a_cohort_forms_without_those_who_miss_the_deadline() -> None:
    run = three_in_training()
    run.on(Ready("a", 1, 0), Ready("b", 1, 0))
    assert run.wait(199) == ()
    assert run.wait(1) == (OpenCohort(),)
    assert run.state.cohort == ("a", "b")
    late = run.on(Ready("c", 1, 0))
    assert [(e.agent, e.reason) for e in late if isinstance(e, Reject)] == [
        ("c", Reason.DEADLINE_PASSED)
    ]


def test_a_cohort_forms_without_those_who_decline() -> None:
    run = three_in_training()
    run.on(Ready("a", 1, 0), Ready("b", 1, 0), Declined("b", 1, Reason.DATA_EMPTY))
    assert run.on(Ready("c", 1, 0)) == (OpenCohort(),)
    assert run.state.cohort == ("a", "c")


def test_too_few_ready_agents_start_the_round_again() -> None:
    run = Run().to(Phase.TRAINING)
    run.on(Ready("a", 1, 0))
    assert run.wait(200) == (AbandonRound(), Invite(BOTH))
    assert (run.state.round, run.state.failures, run.state.phase) == (1, 1, Phase.TRAINING)


def test_an_invited_agent_that_returns_is_invited_again_until_it_is_ready() -> None:
    run = Run().to(Phase.TRAINING)
    again = (AgentDisconnected("a"), AgentConnected("a"))
    assert run.on(*again) == (Invite(frozenset("a")),)
    assert run.on(Ready("a", 1, 0)) == ()
    assert run.on(*again) == ()
    assert run.on(AgentConnected("c")) == ()


def test_the_sum_is_closed_when_all_members_uploaded() -> None:
    run = Run().to(Phase.COLLECTING)
    assert run.on(Uploaded("a", SHA)) == ()
    assert run.on(Uploaded("a", SHA)) == ()
    assert run.on(Ready("b", 1, 9)) == ()  # it restarted and trained again
    assert run.on(Uploaded("b", OTHER_SHA)) == (CloseCohort(),)
    assert run.state.uploaded == {"a": SHA, "b": OTHER_SHA}


def test_a_member_that_returns_is_told_of_the_cohort_again() -> None:
    run = Run().to(Phase.COLLECTING)
    assert run.on(AgentConnected("a")) == (Invite(frozenset("a")), RepeatCohort("a"))
    run.on(Uploaded("a", SHA))
    assert run.on(AgentConnected("a")) == ()
    assert run.on(AgentConnected("c")) == ()


def test_the_sum_is_closed_at_the_deadline_with_enough_updates() -> None:
    run = three_in_training()
    run.on(Ready("a", 1, 0), Ready("b", 1, 0), Ready("c", 1, 0), Uploaded("a", SHA))
    run.on(Uploaded("c", SHA))
    assert run.wait(299) == ()
    assert run.wait(1) == (CloseCohort(),)


def test_too_few_updates_start_the_round_again_with_a_new_attempt() -> None:
    run = Run().to(Phase.COLLECTING)
    run.on(Uploaded("a", SHA))
    assert run.wait(300) == (AbandonRound(), Invite(BOTH))
    assert run.state.uploaded == {}
    assert run.on(Ready("a", 1, 0), Ready("b", 1, 0)) == (OpenCohort(),)
    assert (run.state.round, run.state.attempt) == (1, 2)


def test_a_member_that_declines_is_not_waited_for() -> None:
    run = Run().to(Phase.COLLECTING)
    run.on(Uploaded("a", SHA))
    assert run.on(Declined("a", 1, Reason.INTERNAL)) == ()  # too late: it is counted
    assert run.state.excluded == {}
    assert run.on(Declined("b", 1, Reason.DATA_EMPTY)) == (AbandonRound(),)
    assert run.state.phase is Phase.GATHERING


def test_an_agent_that_declined_for_a_passing_reason_is_invited_again() -> None:
    run = Run().to(Phase.COLLECTING)
    run.on(Uploaded("a", SHA))
    assert run.on(Declined("b", 1, Reason.INTERNAL)) == (AbandonRound(), Invite(BOTH))


def test_the_result_is_published_to_all_who_were_invited() -> None:
    run = Run().to(Phase.SUMMING)
    run.on(AgentDisconnected("b"), AgentConnected("c"))
    assert run.on(SumStored()) == (PublishResult(frozenset("a")),)
    assert run.on(AgentConnected("b")) == (PublishResult(frozenset("b")),)


def test_a_sum_that_cannot_be_stored_starts_the_round_again() -> None:
    run = Run().to(Phase.SUMMING)
    assert run.on(SumFailed()) == (AbandonRound(), Invite(BOTH))


def test_the_next_round_starts_when_all_applied() -> None:
    run = Run().to(Phase.APPLYING)
    assert run.on(Applied("a", 1, SHA)) == ()
    assert run.on(Applied("b", 1, SHA)) == (CloseRound(), Invite(BOTH))
    assert (run.state.round, run.state.attempt, run.state.uploaded) == (2, 0, {})


def test_the_round_closes_without_those_who_left_or_declined() -> None:
    run = Run().to(Phase.APPLYING)
    run.on(Applied("a", 1, SHA))
    assert run.on(AgentDisconnected("b")) == (CloseRound(),)
    run = Run().to(Phase.APPLYING)
    run.on(Declined("b", 1, Reason.PLAN_MISMATCH))
    assert run.on(Applied("a", 1, SHA)) == (CloseRound(),)
    run = Run().to(Phase.APPLYING)
    run.on(Applied("a", 1, SHA))
    assert run.wait(400) == (CloseRound(), Invite(BOTH))


def test_a_cut_of_all_connections_while_applying_ends_no_run() -> None:
    run = Run().to(Phase.APPLYING)
    assert run.on(AgentDisconnected("a"), AgentDisconnected("b")) == ()
    assert run.on(AgentConnected("a")) == (PublishResult(frozenset("a")),)
    assert run.on(Applied("a", 1, SHA)) == (CloseRound(),)


def test_a_state_that_differs_from_the_majority_is_rejected() -> None:
    run = three_in_training()
    run.on(*(Ready(agent, 1, 0) for agent in "abc"), *(Uploaded(agent, SHA) for agent in "abc"))
    run.on(SumStored(), Applied("a", 1, SHA), Applied("b", 1, OTHER_SHA))
    reject, *rest = run.on(Applied("c", 1, OTHER_SHA))
    assert isinstance(reject, Reject)
    assert (reject.agent, reject.reason) == ("a", Reason.STATE_DIVERGED)
    assert rest == [CloseRound(), Invite(frozenset("abc"))]  # it applies the history anew


def test_a_run_completes_after_its_last_round() -> None:
    run = Run(rounds=1).to(Phase.APPLYING)
    effects = run.on(Applied("a", 1, SHA), Applied("b", 1, SHA))
    assert effects == (CloseRound(), FinishRun())
    assert run.state.phase is Phase.COMPLETED
    assert run.state.reason is None


def test_a_sum_that_nobody_can_apply_fails_the_run_with_their_reason() -> None:
    run = Run().to(Phase.APPLYING)
    run.on(Declined("a", 1, Reason.SUM_NOT_VERIFIED))
    assert run.on(Declined("b", 1, Reason.SUM_NOT_VERIFIED)) == (FinishRun(),)
    assert run.state.reason is Reason.SUM_NOT_VERIFIED
    silent = Run().to(Phase.APPLYING)
    assert silent.wait(400) == (FinishRun(),)
    assert silent.state.reason is Reason.QUORUM_NOT_REACHED


def test_a_round_is_tried_only_so_often() -> None:
    run = Run().to(Phase.TRAINING)
    for _ in range(MAX_ROUND_FAILURES - 1):
        assert run.wait(200) == (AbandonRound(), Invite(BOTH))
    assert run.wait(200) == (AbandonRound(), FinishRun())
    assert run.state.reason is Reason.QUORUM_NOT_REACHED
