"""How a run is doing: read once, read again and again, and with what its process knows."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.progress import (
    OpenPhase,
    ProgressReader,
    RoundProgress,
    RunProgress,
    merged,
    open_phase,
)
from coordinator.run_state import Phase, RunState, StateReport, Wish
from coordinator.store import RoundRecord, Store
from coordinator.summaries import RunSummary, Stage
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason
from fedloom.terms import Protection, Release
from tests.coordinator.samples import POLICY, SHA

SUM = ArtifactReference(bytes(32), 3)
RUN = RunSummary(
    bytes(range(16)),
    "intent",
    Phase.TRAINING,
    None,
    Wish.RUN,
    2,
    1,
    3,
    2,
    0.0,
    bytes(32),
    Protection.SEALED,
    Release.AGENTS,
)


def fill(store: Store, run_id: bytes) -> None:
    """One finished round of two agents, and one that is open."""
    store.report(run_id, 0, "a", refusal=21)  # wrapping a key is no round
    for agent, loss, correct in (("a", 0.5, 9), ("b", 1.5, None)):
        store.report(run_id, 1, agent, progress=1.0, training_loss=loss, state_sha256=bytes(32))
        store.report(run_id, 1, agent, sent_bytes=3_000_000, received_bytes=1_000_000)
        if correct is not None:
            store.report(run_id, 1, agent, evaluated=10, correct=correct)
            store.report(run_id, 1, agent, saturated=4, saturated_share=0.25)
    store.add_round(run_id, RoundRecord(1, 1, 16, (0, 1), SUM, 2.0))
    store.report(run_id, 2, "a", progress=0.5)
    store.report(run_id, 2, "b", refusal=Reason.DATA_EMPTY.value)


def read(store: Store, run_id: bytes, **known: RunState | OpenPhase | None) -> RunProgress:
    return ProgressReader(store, run_id).read(RUN, "nothing", 10, **known)  # type: ignore[arg-type]


def test_progress_is_read_from_the_store(store: Store, run_id: bytes) -> None:
    fill(store, run_id)
    found = read(store, run_id)
    first, second = found.history
    assert (first.round, first.seconds, first.training_loss) == (1, 2.0, 1.0)
    assert (first.accuracy, first.evaluated, first.agents, first.summed) == (0.9, 10, 2, 2)
    assert (first.saturated, first.saturated_share) == (4, 0.25)
    assert (first.sent_bytes, first.senders, first.received_bytes) == (6_000_000, 2, 2_000_000)
    assert (second.round, second.seconds, second.accuracy, second.summed) == (2, None, None, 0)
    assert [(agent.agent, agent.stage) for agent in found.agents] == [
        ("a", Stage.TRAINING),
        ("b", Stage.DECLINED),
    ]
    assert found.agents[1].refusal is Reason.DATA_EMPTY
    assert found.stages == {Stage.TRAINING: 1, Stage.DECLINED: 1}


def test_a_run_without_reports_has_no_history(store: Store, run_id: bytes) -> None:
    found = read(store, run_id)
    assert (found.history, found.agents, found.stages) == ((), (), {})


def test_what_the_process_knows_places_agents_that_said_nothing(
    store: Store, run_id: bytes
) -> None:
    store.report(run_id, 2, "b", progress=1.0, training_seconds=3.0)
    store.report(run_id, 2, "c", progress=1.0, training_seconds=3.0)
    state = RunState(
        POLICY,
        deadline=9.0,
        phase=Phase.COLLECTING,
        round=2,
        invited=frozenset("abc"),
        cohort=("b", "c"),
        uploaded={"c": SHA},
    )
    found = read(store, run_id, state=state)
    assert [(agent.agent, agent.stage) for agent in found.agents] == [
        ("a", Stage.INVITED),
        ("b", Stage.READY),
        ("c", Stage.UPLOADED),
    ]


def test_those_furthest_behind_are_named_and_all_are_counted(store: Store, run_id: bytes) -> None:
    for number in range(40):
        store.report(run_id, 1, f"agent-{number:02}", progress=((number * 7) % 40) / 40)
    found = ProgressReader(store, run_id).read(RUN, "nothing", 4)
    assert [agent.progress for agent in found.agents] == [0.0, 1 / 40, 2 / 40, 3 / 40]
    assert sum(found.stages.values()) == 40


REPORTS = st.tuples(
    st.sampled_from("abc"),
    st.sampled_from(
        [
            {"progress": 0.5},
            {"progress": 1.0, "training_seconds": 2.0, "training_loss": 0.5},
            {"state_sha256": SHA, "evaluated": 4, "correct": 3},
            {"refusal": 18},
            {"sent_bytes": 5, "received_bytes": 6},
        ]
    ),
)
NEXT_ROUND, VOID_ROUND = "next", "void"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    st.lists(st.one_of(REPORTS, st.sampled_from([NEXT_ROUND, VOID_ROUND])), max_size=12),
    st.binary(min_size=16, max_size=16),
)
def test_a_reader_that_looks_all_the_time_sees_what_one_sees_that_looks_once(
    store: Store, happened: list[tuple[str, dict[str, object]] | str], run_id: bytes
) -> None:
    if any(run.run_id == run_id for run in store.runs()):
        return
    store.add_run(run_id, "n", 'plan = "p"\nrounds = 9', SUM, now=0.0)
    reader, number, watched = ProgressReader(store, run_id), 1, None
    for event in happened:
        if isinstance(event, tuple):
            store.report(run_id, number, event[0], **event[1])
        else:
            if event == NEXT_ROUND:
                store.add_round(run_id, RoundRecord(number, 1, 16, (0, 1), SUM, 2.0))
            number += 1
        seen = reader.read(RUN, "nothing", 10)
        watched = merged(watched, seen)
        assert seen == watched == ProgressReader(store, run_id).read(RUN, "nothing", 10)


@pytest.mark.parametrize(
    ("changes", "done", "expected"),
    [
        ({"phase": Phase.GATHERING, "connected": frozenset("ab")}, 2, 2),
        ({"phase": Phase.TRAINING, "invited": frozenset("abc"), "ready": {"a": 1}}, 1, 3),
        ({"phase": Phase.COLLECTING, "cohort": ("a", "b"), "uploaded": {"a": SHA}}, 1, 2),
        ({"phase": Phase.SUMMING, "uploaded": {"a": SHA, "b": SHA}}, 2, 2),
        (
            {
                "phase": Phase.APPLYING,
                "uploaded": {"a": SHA, "b": SHA},
                "applied": {"b": StateReport(SHA)},
            },
            1,
            2,
        ),
        ({"phase": Phase.RETURNING, "returning": "a"}, 0, 1),
    ],
    ids=lambda value: value["phase"].value if isinstance(value, dict) else "",
)
def test_what_a_phase_waits_for(changes: dict[str, object], done: int, expected: int) -> None:
    state = replace(RunState(POLICY, deadline=7.0), **changes)  # type: ignore[arg-type]
    found = open_phase(state, 5, bytes(16))
    assert (found.done, found.expected, found.connected, found.behind) == (done, expected, 5, None)
    assert found.deadline == (None if state.phase is Phase.SUMMING else 7.0)


def test_a_queued_run_waits_for_another_and_a_paused_one_for_ever() -> None:
    assert open_phase(None, 5, bytes(16)) == OpenPhase(behind=bytes(16), connected=5)
    paused = replace(RunState(POLICY, deadline=7.0), paused=True)
    assert open_phase(paused, 0, None).deadline is None


def test_shares_of_nothing_are_none() -> None:
    entry = RoundProgress(1)
    assert (entry.accuracy, entry.saturated_share) == (None, None)
    assert entry.to_json()["sent_bytes_per_agent"] is None
