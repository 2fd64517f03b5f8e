"""What an operator is told arrives as it was said."""

from enum import Enum

import pytest
from google.protobuf.descriptor import EnumDescriptor
from hypothesis import given
from hypothesis import strategies as st

from coordinator import admin_messages as messages
from coordinator.progress import (
    AgentProgress,
    OpenPhase,
    RoundProgress,
    RunProgress,
    merged,
)
from coordinator.run_state import Phase, Wish
from coordinator.summaries import (
    AgentSummary,
    InvitationSummary,
    PlanPart,
    PlanSummary,
    PrivacyReport,
    RunSummary,
    Stage,
)
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection, Release
from fedloom.v1 import admin_pb2

times = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds / 1e6)
counts = st.integers(0, 2**32 - 1)
large = st.integers(0, 2**63 - 1)
shares = st.floats(0, 1, width=32)
losses = st.none() | st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=20)
ids = st.binary(min_size=16, max_size=16)
digests = st.binary(min_size=32, max_size=32)
runs = st.builds(
    RunSummary,
    ids,
    names,
    st.sampled_from(Phase),
    st.none() | st.sampled_from(Reason),
    st.sampled_from(Wish),
    counts,
    counts,
    counts,
    counts,
    times,
    digests,
    st.none() | st.sampled_from(Protection),
    st.none() | st.sampled_from(Release),
)
rounds = st.builds(
    RoundProgress,
    counts,
    st.none() | times,
    counts,
    losses,
    large,
    large,
    counts,
    large,
    st.none() | shares,
    large,
    counts,
    large,
    counts,
)
agents = st.builds(
    AgentProgress,
    names,
    st.sampled_from(Stage),
    shares,
    losses,
    large,
    large,
    st.none() | large,
    st.none() | large,
    st.none() | st.sampled_from(Reason),
)
progress = st.builds(
    RunProgress,
    runs,
    names,
    st.none() | st.builds(OpenPhase, counts, counts, st.none() | times, st.none() | ids, counts),
    st.lists(rounds, max_size=6, unique_by=lambda entry: entry.round).map(
        lambda found: tuple(sorted(found, key=lambda entry: entry.round))
    ),
    st.lists(agents, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(Stage), counts),
)


@given(runs)
def test_runs(run: RunSummary) -> None:
    assert messages.read_run(messages.run_message(run)) == run


@given(
    st.builds(
        AgentSummary,
        names,
        times,
        st.none() | times,
        st.none() | times,
        st.booleans(),
        st.none() | times,
        names,
    )
)
def test_agents(agent: AgentSummary) -> None:
    assert messages.read_agent(messages.agent_message(agent)) == agent


@given(st.builds(InvitationSummary, names, names, times, counts, counts, st.none() | times))
def test_invitations(invitation: InvitationSummary) -> None:
    assert messages.read_invitation(messages.invitation_message(invitation)) == invitation


@given(
    st.builds(
        PlanSummary,
        digests,
        names,
        names,
        large,
        counts,
        counts,
        st.lists(st.tuples(names, large), max_size=3).map(tuple),
        counts,
        names,
        names,
        st.lists(st.builds(PlanPart, names, counts, large), max_size=3).map(tuple),
    )
)
def test_plans(plan: PlanSummary) -> None:
    assert messages.read_plan(messages.plan_message(plan)) == plan


@given(
    st.builds(
        PrivacyReport,
        runs,
        counts,
        st.booleans(),
        st.lists(st.tuples(names, names), max_size=3).map(tuple),
        names,
    )
)
def test_privacy(report: PrivacyReport) -> None:
    assert messages.read_privacy(messages.privacy_message(report)) == report


@given(st.lists(progress, min_size=1, max_size=4), st.integers(1, 3))
def test_a_watcher_that_is_told_the_changes_knows_the_state(
    states: list[RunProgress], most: int
) -> None:
    """Rounds are never taken back, so each state here keeps those of the state before it."""
    told: RunProgress | None = None
    known: RunProgress | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "MAX_ROUNDS_PER_MESSAGE", most)
        for state in states:
            state = merged(told, state)
            sent = list(messages.progress_messages(state, told))
            assert [message.more for message in sent] == [*[True] * (len(sent) - 1), False]
            for message in sent:
                assert len(message.rounds) <= most
                read = admin_pb2.WatchRunResponse.FromString(message.SerializeToString())
                known = merged(known, messages.read_progress(read))
            assert known == state
            told = state


@pytest.mark.parametrize(
    ("table", "members", "proto"),
    [
        (messages.PHASES, Phase, admin_pb2.RunPhase.DESCRIPTOR),
        (messages.WISHES, Wish, admin_pb2.RunWish.DESCRIPTOR),
        (messages.STAGES, Stage, admin_pb2.AgentStage.DESCRIPTOR),
    ],
    ids=["phases", "wishes", "stages"],
)
def test_every_member_has_the_number_of_its_name(
    table: dict[Enum, int], members: type[Enum], proto: EnumDescriptor
) -> None:
    prefix = proto.values[0].name.removesuffix("UNSPECIFIED")
    stated = {value.name.removeprefix(prefix): value.number for value in proto.values[1:]}
    assert {member.name: table[member] for member in members} == stated


def test_what_a_newer_coordinator_says_is_not_guessed_at() -> None:
    for message in (admin_pb2.Run(phase=99), admin_pb2.Run(phase=1, reason=99), admin_pb2.Run()):
        with pytest.raises(Refused) as caught:
            messages.read_run(message)
        assert caught.value.reason is Reason.PROTOCOL_UNSUPPORTED


def test_a_name_that_is_no_utf8_travels() -> None:
    assert messages.read_plan(messages.plan_message(PlanSummary(bytes(32), "a\udcff"))).name == "a?"
