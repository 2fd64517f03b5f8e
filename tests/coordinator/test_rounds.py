"""The state machine of a run: every arrow of its picture, one example each."""

from dataclasses import replace

from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    AgentRemoved,
    Applied,
    AskForSum,
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
    SumReturned,
    SumStored,
    TakenUp,
    Tick,
    Uploaded,
    Wished,
)
from coordinator.rounds import KEY_SECONDS, MAX_ROUND_FAILURES
from coordinator.run_keys import Grant
from coordinator.run_state import Phase, Wish
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


def fresh(holder: str, key_id: int, recipients: str) -> tuple[ShareKey, ...]:
    return (ShareKey(Grant(holder, key_id, frozenset(recipients), fresh=True)),)


def old(holder: str, key_id: int, recipients: str) -> tuple[ShareKey, ...]:
    return (ShareKey(Grant(holder, key_id, frozenset(recipients), fresh=False)),)


def shared(holder: str, key_id: int, recipients: str) -> KeyShared:
    return KeyShared(holder, key_id, dict.fromkeys(recipients, b""))


def after_one_round() -> Run:
    """A run with a key whose first round a and b have finished; c came meanwhile."""
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), shared("a", 1, "ab"))
    run.on(Ready("a", 1, 0), Ready("b", 1, 0))
    run.on(Uploaded("a", SHA), Uploaded("b", SHA), SumStored(), Applied("a", 1, SHA))
    return run


def test_a_round_starts_when_all_hold_the_run_key() -> None:
    run = Run(needs_key=True)
    assert run.on(AgentConnected("b"), AgentConnected("a")) == fresh("a", 1, "ab")
    assert run.on(shared("b", 1, "ab")) == ()  # nobody asked b
    assert run.on(shared("a", 2, "ab")) == ()  # nor for a key of that number
    assert run.on(shared("a", 1, "ab")) == (Invite(BOTH),)


def test_a_newcomer_has_a_new_key_made_and_is_given_those_of_the_history() -> None:
    run = after_one_round()
    run.on(AgentConnected("c"))
    assert run.on(Applied("b", 1, SHA)) == (CloseRound(), *fresh("a", 2, "abc"))
    assert run.on(shared("a", 2, "abc")) == old("a", 1, "c")
    assert run.on(shared("a", 1, "c")) == (Invite(frozenset("abc")),)


def test_an_agent_that_was_away_is_given_the_newest_key_and_none_is_made() -> None:
    run = after_one_round()
    run.on(AgentConnected("c"), Applied("b", 1, SHA), AgentDisconnected("b"))
    run.on(shared("a", 2, "ac"), shared("a", 1, "c"))  # round 2 began without b
    run.on(Ready("a", 2, 0), Ready("c", 2, 0), Uploaded("a", SHA), Uploaded("c", SHA), SumStored())
    run.on(AgentConnected("b"), Applied("a", 2, SHA))
    assert run.state.phase is Phase.APPLYING
    run.state = replace(run.state, policy=replace(run.state.policy, rounds=3))
    assert run.on(Applied("c", 2, SHA)) == (CloseRound(), *old("a", 2, "b"))


def test_a_banned_agent_is_left_out_and_the_others_make_a_new_key() -> None:
    run = after_one_round()
    run.on(AgentConnected("c"), AgentRemoved("b"))
    assert run.state.phase is Phase.GATHERING
    assert run.state.grant == Grant("a", 2, frozenset("ac"), fresh=True)
    assert run.on(AgentRemoved("c")) == ()  # a alone is too few
    assert run.on(shared("a", 2, "ac")) == ()  # too late: it was wrapped for c as well
    assert run.on(AgentConnected("d")) == fresh("a", 3, "ad")


def test_a_spent_key_is_replaced_before_the_next_try() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), shared("a", 1, "ab"))
    effects = run.on(Declined("a", 1, Reason.KEY_SPENT), Ready("b", 1, 0))
    assert effects == (AbandonRound(), *fresh("a", 2, "ab"))


def test_an_agent_that_wraps_no_key_is_passed_over() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), AgentConnected("c"))
    assert run.wait(KEY_SECONDS - 1) == ()
    assert run.wait(1) == fresh("b", 2, "bc")
    assert run.on(Declined("b", 0, Reason.KEY_UNAVAILABLE)) == ()  # c alone is too few
    assert run.on(AgentConnected("a")) == fresh("a", 3, "ac")
    assert run.on(AgentDisconnected("a")) == ()
    assert run.state.grant is None


def test_a_key_that_nobody_here_holds_and_nothing_was_encrypted_under_is_made_anew() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), shared("a", 1, "a"))  # b's did not verify
    run.on(AgentDisconnected("a"), AgentConnected("b"))
    assert run.on(AgentConnected("c")) == fresh("b", 2, "bc")


def test_without_a_holder_of_the_history_s_key_the_run_waits() -> None:
    run = after_one_round()
    run.on(AgentConnected("c"), AgentConnected("d"))
    run.on(AgentDisconnected("a"), AgentDisconnected("b"))
    run.on(shared("c", 2, "cd"))
    assert run.state.phase is Phase.GATHERING
    assert run.on(Tick()) == ()
    assert run.on(AgentConnected("a")) == old("a", 1, "cd")
    assert run.on(shared("a", 1, "cd")) == old("c", 2, "a")


def test_who_gets_no_envelope_is_not_invited() -> None:
    run = Run(needs_key=True)
    run.on(AgentConnected("a"), AgentConnected("b"), AgentConnected("c"))
    assert run.on(shared("a", 1, "ab")) == old("a", 1, "c")  # it came meanwhile
    assert run.on(KeyShared("a", 1, {})) == (Invite(BOTH),)
    assert run.state.excluded == {"c": Reason.KEY_UNAVAILABLE}


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


# void rounds, returned sums, the operator's wishes, restarts


def masked_run() -> Run:
    run = Run()
    run.state = replace(run.state, policy=replace(run.state.policy, has_masks=True))
    return run.to(Phase.SUMMING)


def test_a_round_whose_masks_stay_in_its_sum_is_void() -> None:
    run = masked_run()
    assert run.on(SumFailed()) == (AbandonRound(), Invite(BOTH))
    state = run.state
    assert (state.round, state.attempt, state.previous_round, state.completed) == (2, 0, 0, 0)
    run.on(Ready("a", 2, 0), Ready("b", 2, 0), Uploaded("a", SHA), Uploaded("b", SHA), SumStored())
    run.on(Applied("a", 2, SHA), Applied("b", 2, SHA))
    state = run.state
    assert (state.round, state.previous_round, state.completed, state.failures) == (3, 2, 1, 0)


def test_too_many_void_rounds_in_a_row_fail_the_run() -> None:
    run = masked_run()
    for number in range(1, MAX_ROUND_FAILURES):
        run.on(SumFailed())
        assert run.state.round == number + 1
        run.on(Ready("a", number + 1, 0), Ready("b", number + 1, 0))
        run.on(Uploaded("a", SHA), Uploaded("b", SHA))
    assert run.on(SumFailed()) == (AbandonRound(), FinishRun())
    assert run.state.reason is Reason.QUORUM_NOT_REACHED


def returning_run() -> Run:
    run = Run()
    run.state = replace(run.state, policy=replace(run.state.policy, returns_sums=True))
    return run.to(Phase.APPLYING)


def test_an_opened_sum_is_asked_of_an_agent_that_another_confirms() -> None:
    run = returning_run()
    run.on(Applied("a", 1, SHA, opened_sha256=OTHER_SHA))
    assert run.on(Applied("b", 1, SHA, opened_sha256=OTHER_SHA)) == (AskForSum("a"),)
    assert run.on(AgentDisconnected("a")) == (AskForSum("b"),)
    assert run.on(AgentDisconnected("b")) == ()
    assert run.on(AgentConnected("a")) == (AskForSum("a"),)
    assert run.on(Declined("b", 1, Reason.NOT_FOUND))[0].agent == "b"  # was not asked
    assert run.on(SumReturned("a"))[0] == CloseRound()
    assert run.state.completed == 1


def test_a_sum_that_only_one_agent_states_is_not_taken() -> None:
    run = returning_run()
    run.on(Applied("a", 1, SHA, opened_sha256=OTHER_SHA))
    effects = run.on(Applied("b", 1, SHA, opened_sha256=SHA))
    assert FinishRun() in effects
    assert run.state.reason is Reason.QUORUM_NOT_REACHED


def test_a_run_without_anyone_to_return_its_sum_fails() -> None:
    run = returning_run()
    run.on(Applied("a", 1, SHA, opened_sha256=SHA), Applied("b", 1, SHA, opened_sha256=SHA))
    assert run.on(Declined("a", 1, Reason.NOT_FOUND)) == (AskForSum("b"),)
    assert run.wait(run.state.policy.upload_seconds) == (FinishRun(),)
    assert run.state.reason is Reason.DEADLINE_PASSED


def test_the_next_cohort_s_clip_is_what_most_agents_computed() -> None:
    run = Run().to(Phase.APPLYING)
    run.on(Applied("a", 1, SHA, next_clip=0.25), Applied("b", 1, SHA, next_clip=0.25))
    assert run.state.clip == 0.25


def test_a_pause_lets_the_open_round_finish_and_holds_the_next() -> None:
    run = Run().to(Phase.TRAINING)
    run.on(Wished(Wish.PAUSE), Ready("a", 1, 0), Ready("b", 1, 0))
    run.on(Uploaded("a", SHA), Uploaded("b", SHA), SumStored(), Applied("a", 1, SHA))
    assert run.on(Applied("b", 1, SHA)) == (CloseRound(),)
    assert run.wait(10 * run.state.policy.gathering_seconds) == ()
    assert run.on(AgentConnected("c")) == ()
    assert run.on(Wished(Wish.RUN)) == (Invite(frozenset("abc")),)


def test_a_cancelled_run_ends_at_once_and_ignores_what_was_under_way() -> None:
    run = Run().to(Phase.SUMMING)
    assert run.on(Wished(Wish.CANCEL)) == (AbandonRound(), FinishRun())
    assert run.state.reason is Reason.RUN_CANCELLED
    assert run.on(SumStored()) == ()
    assert run.on(Wished(Wish.CANCEL)) == ()


def test_a_quorum_of_ready_agents_forms_the_cohort() -> None:
    run = three_in_training()
    run.state = replace(run.state, policy=replace(run.state.policy, quorum=2))
    assert run.on(Ready("c", 1, 0)) == ()
    assert run.on(Ready("a", 1, 0)) == (OpenCohort(),)
    assert run.state.cohort == ("a", "c")


def test_a_restart_gives_the_phase_its_time_anew_and_asks_again() -> None:
    run = Run().to(Phase.TRAINING)
    run.on(Ready("a", 1, 0))
    run.now = 10_000.0
    assert run.on(TakenUp(frozenset("ab"))) == (Invite(frozenset("b")),)
    assert run.state.deadline == run.now + run.state.policy.training_seconds
    run.on(Ready("b", 1, 0), Uploaded("a", SHA))
    assert run.on(TakenUp(frozenset("ab"))) == (Invite(frozenset("b")), RepeatCohort("b"))
    run.on(Uploaded("b", SHA))
    assert run.on(TakenUp(BOTH)) == ()
    run.on(SumStored(), Applied("a", 1, SHA))
    assert run.on(TakenUp(BOTH)) == (PublishResult(frozenset("b")),)
    assert run.on(Applied("b", 1, SHA))[0] == CloseRound()


def test_a_restarted_run_does_not_begin_without_those_who_come_later() -> None:
    run = Run()
    assert run.on(TakenUp(frozenset())) == ()
    assert run.on(TakenUp(frozenset("abc"))) == (Invite(frozenset("abc")),)


# asynchronous runs

THREE = frozenset("abc")


def asynchronous(**policy: object) -> Run:
    """A run whose buffer of two is open for a, b and c."""
    run = Run()
    changed = {"buffer": 2, "max_staleness": 1, "rounds": 9, **policy}
    policies = replace(run.state.policy, **changed)  # type: ignore[arg-type]
    run.state = replace(run.state, policy=policies, connected=frozenset("bc"))
    assert run.on(AgentConnected("a")) == (Invite(THREE),)
    return run


def one_round_without_c() -> Run:
    """The same after a and b have made a round; c trains on."""
    run = asynchronous()
    assert run.on(Ready("b", 1, 0), Ready("a", 1, 0)) == (OpenCohort(),)
    run.on(Uploaded("a", SHA), Uploaded("b", SHA))
    assert run.on(SumStored()) == (PublishResult(BOTH),)
    run.on(Applied("a", 1, SHA))
    assert run.on(Applied("b", 1, SHA)) == (CloseRound(), Invite(THREE))
    return run


def test_the_first_that_are_ready_are_the_cohort_and_nobody_waits_for_the_others() -> None:
    run = one_round_without_c()
    assert (run.state.round, run.state.phase) == (2, Phase.TRAINING)
    before = run.state
    assert run.on(Ready("c", 1, 0)) == ()  # it cannot have known: the next invitation asks it
    assert run.state is before
    assert run.on(Ready("c", 2, 0, base_rounds=0), Ready("a", 2, 0, base_rounds=1)) == (
        OpenCohort(),
    )
    assert run.state.cohort == ("a", "c")
    assert run.state.staleness == {"a": 0, "c": 1}


def test_ready_while_a_sum_is_made_is_not_refused() -> None:
    run = asynchronous()
    run.on(Ready("a", 1, 0), Ready("b", 1, 0))
    for event in (Uploaded("a", SHA), Uploaded("b", SHA), SumStored(), Applied("a", 1, SHA)):
        assert run.on(Ready("c", 1, 0)) == ()
        run.on(event)
    assert run.on(Declined("c", 1, Reason.TRAINING_FAILED)) == ()
    assert run.state.excluded == {}


def test_an_update_that_is_too_old_is_refused_and_asked_for_again() -> None:
    run = one_round_without_c()
    run.on(Ready("a", 2, 0, base_rounds=1), Ready("b", 2, 0, base_rounds=1))
    run.on(Uploaded("a", SHA), Uploaded("b", SHA), SumStored())
    run.on(Applied("a", 2, SHA), Applied("b", 2, SHA))
    before = run.state
    reject, again = run.on(Ready("c", 3, 0, base_rounds=0))
    assert isinstance(reject, Reject)
    assert reject.reason is Reason.DEADLINE_PASSED
    assert again == Invite(frozenset("c"))
    assert run.state is before
    for impossible in (3, 99):
        assert isinstance(run.on(Ready("c", 3, 0, base_rounds=impossible))[0], Reject)


def test_who_comes_while_others_train_takes_part_at_once() -> None:
    run = asynchronous()
    assert run.on(AgentConnected("d")) == (Invite(frozenset("d")),)
    assert run.on(Ready("d", 1, 0), Ready("a", 1, 0)) == (OpenCohort(),)


def test_who_leaves_is_not_waited_for_in_any_phase() -> None:
    run = asynchronous(minimum_agents=1)
    run.on(Ready("a", 1, 0), AgentDisconnected("c"))
    assert run.on(AgentDisconnected("b")) == (OpenCohort(),)
    assert run.state.cohort == ("a",)
    run = asynchronous(minimum_agents=1)
    run.on(Ready("a", 1, 0), Ready("b", 1, 0), Uploaded("a", SHA))
    assert run.on(AgentDisconnected("b")) == (CloseCohort(),)
    assert run.on(SumStored()) == (PublishResult(frozenset("a")),)
    # The sum is history; its only member here leaves before it tells of its state.
    assert run.on(AgentDisconnected("a")) == (PublishResult(frozenset("c")),)
    assert run.on(Applied("c", 1, SHA)) == (CloseRound(), Invite(frozenset("c")))


def test_who_was_ready_and_left_is_no_member() -> None:
    run = asynchronous()
    run.on(Ready("a", 1, 0), AgentDisconnected("a"), Ready("b", 1, 0))
    assert run.state.phase is Phase.TRAINING
    assert run.on(AgentConnected("a")) == (Invite(frozenset("a")),)
    assert run.on(Ready("a", 1, 0)) == (OpenCohort(),)


def test_under_masks_a_sum_closes_early_only_if_it_can_be_opened() -> None:
    """Of five members four must be in it, whatever the minimum is."""
    run = asynchronous(minimum_agents=3, cohort_size=5, buffer=5, has_masks=True)
    run.on(AgentConnected("d"), AgentConnected("e"))
    run.on(*(Ready(agent, 1, 0) for agent in "abcde"))
    run.on(*(Uploaded(agent, SHA) for agent in "abc"))
    run.on(AgentDisconnected("d"))
    assert run.on(AgentDisconnected("e")) == ()
    run.on(AgentConnected("d"))
    assert run.on(Uploaded("d", SHA)) == (CloseCohort(),)
