"""What an operator sees of a run: read from the store, drawn on a terminal, printed elsewhere."""

import io
import json

import pytest
from rich.console import Console

from coordinator.progress import RunProgress, read_progress, show, watch
from coordinator.run_state import Phase
from coordinator.store import RoundRecord, Store
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason
from fedloom.terms import Protection

SUM = ArtifactReference(bytes(32), 3)
MARKUP = "[/red] [bold]n[1]"  # a name that rich would take for markup


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)


def text_of(drawn: Console) -> str:
    assert isinstance(drawn.file, io.StringIO)
    return drawn.file.getvalue()


def fill(store: Store, run_id: bytes) -> None:
    """One finished round of two agents, and one that is open."""
    store.report(run_id, 0, "a", refusal=21)  # wrapping a key is no round
    for agent, loss, correct in (("a", 0.5, 9), ("b", 1.5, None)):
        store.report(run_id, 1, agent, progress=1.0, training_loss=loss, state_sha256=bytes(32))
        store.report(run_id, 1, agent, sent_bytes=3_000_000, received_bytes=1_000_000)
        if correct is not None:
            store.report(run_id, 1, agent, evaluated=10, correct=correct, saturated=4)
    store.add_round(run_id, RoundRecord(1, 1, 16, (0, 1), SUM, 2.0))
    store.report(run_id, 2, "a", progress=0.5)
    store.report(run_id, 2, "b", refusal=Reason.DATA_EMPTY.value)
    store.update_run(run_id, Phase.TRAINING, 2, 0)


def read(store: Store, run_id: bytes) -> RunProgress:
    return read_progress(store, store.run(run_id))


def test_progress_is_read_from_the_store(store: Store, run_id: bytes) -> None:
    fill(store, run_id)
    found = read(store, run_id)
    assert (found.run_id, found.name, found.rounds) == (run_id.hex(), "intent", 3)
    assert (found.phase, found.reason, found.protection) == (
        Phase.TRAINING,
        None,
        Protection.ENCRYPTED,
    )
    assert found.coordinator_reads == "nothing"
    first, second = found.history
    assert (first.round, first.seconds, first.training_loss) == (1, 2.0, 1.0)
    assert (first.accuracy, first.evaluated, first.saturated) == (0.9, 10, 4)
    assert [agent.accuracy for agent in first.agents] == [0.9, None]
    assert (second.round, second.seconds, second.accuracy) == (2, None, None)
    assert [agent.progress for agent in second.agents] == [0.5, 0.0]
    assert second.agents[1].refusal == Reason.DATA_EMPTY.value


def test_a_run_without_reports_has_no_history(store: Store, run_id: bytes) -> None:
    found = read(store, run_id)
    assert found.history == ()
    assert found.phase is Phase.GATHERING


def test_progress_is_json(store: Store, run_id: bytes) -> None:
    fill(store, run_id)
    store.update_run(run_id, Phase.FAILED, 2, 0, Reason.QUORUM_NOT_REACHED)
    plain = json.loads(json.dumps(read(store, run_id).to_json(), allow_nan=False))
    assert (plain["phase"], plain["reason"]) == ("failed", "QUORUM_NOT_REACHED")
    assert (plain["protection"], plain["history"][0]["agents"][0]["agent"]) == ("encrypted", "a")


def test_it_is_drawn_as_a_table(store: Store, run_id: bytes) -> None:
    fill(store, run_id)
    drawn = console()
    drawn.print(show(read(store, run_id)))
    text = text_of(drawn)
    for shown in ("run intent", "1/3", "90.0%", "1.000", "2.0", "3.00 MB", "1.00 MB", "nothing"):
        assert shown in text
    assert "training: a 50%, b 0%" in text
    store.update_run(run_id, Phase.FAILED, 2, 0, Reason.QUORUM_NOT_REACHED)
    drawn.print(show(read(store, run_id)))
    assert "failed: QUORUM_NOT_REACHED" in text_of(drawn)


@pytest.mark.parametrize("terminal", [False, True], ids=["a file", "a terminal"])
def test_a_name_is_shown_as_it_is(store: Store, terminal: bool) -> None:
    config = 'plan = "p"\nrounds = 1\nname = "n"'
    store.add_run(bytes(16), MARKUP, config, ArtifactReference(bytes(32), 1), now=0.0)
    store.update_run(bytes(16), Phase.COMPLETED, 1, 0)
    drawn = console(terminal)
    watch(store, read(store, bytes(16)), drawn)
    assert f"run {MARKUP}" in text_of(drawn)


def test_a_finished_run_is_told_without_a_terminal(store: Store, run_id: bytes) -> None:
    fill(store, run_id)
    store.update_run(run_id, Phase.COMPLETED, 3, 0)
    drawn = console()
    last = watch(store, read(store, run_id), drawn)
    assert last.phase is Phase.COMPLETED
    lines = text_of(drawn).splitlines()
    assert lines[0] == "run intent: round 2/3, completed, trained 25%"
    assert lines[-1].strip() == "completed"


def test_a_run_is_followed_to_its_end_a_line_for_each_change(
    store: Store, run_id: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        lambda: None,  # nothing new: no line
        lambda: store.update_run(run_id, Phase.TRAINING, 1, 0),
        lambda: store.report(run_id, 1, "a", progress=0.5),
        lambda: store.report(run_id, 1, "a", evaluated=4, correct=3),
        lambda: store.update_run(run_id, Phase.FAILED, 1, 1, Reason.KEY_UNAVAILABLE),
    ]
    monkeypatch.setattr("coordinator.progress.time.sleep", lambda _: steps.pop(0)())
    drawn = console()
    last = watch(store, read(store, run_id), drawn)
    assert (steps, last.reason) == ([], "KEY_UNAVAILABLE")
    assert text_of(drawn).splitlines()[:5] == [
        "run intent: gathering",
        "run intent: training",
        "run intent: round 1/3, training, trained 50%",
        "run intent: round 1/3, training, accuracy 75.0%",
        "run intent: round 1/3, failed, accuracy 75.0%",
    ]
