"""The audit log: what was written stays, in order, and whatever is changed shows."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.audit import (
    Action,
    AuditBroken,
    AuditEntry,
    AuditLog,
    Fact,
    audit,
    local_operator,
)
from coordinator.store import Store

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
FACTS = st.dictionaries(
    st.sampled_from(["run", "round", "share", "fresh"]),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    max_size=4,
)  # fmt: skip
DEEDS = st.lists(st.tuples(NAMES, st.sampled_from(Action), NAMES, FACTS), min_size=1, max_size=6)
COLUMNS = [column.name for column in audit.columns]
Deed = tuple[str, Action, str, dict[str, Fact]]


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here is a law of every kind of store."""
    return any_store


@pytest.fixture
def log(store: Store) -> AuditLog:
    return AuditLog(store.engine)


@pytest.fixture
def five(log: AuditLog) -> list[AuditEntry]:
    """A log of five deeds."""
    return [log.append("operator eva", Action.RUN_PAUSED, f"run-{i}", round=i) for i in range(5)]


def fresh() -> Iterator[AuditLog]:
    """Yield an empty log in memory."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    audit.create(engine)
    yield AuditLog(engine)
    engine.dispose()


@given(DEEDS)
def test_what_was_written_is_read_in_order_and_verifies(deeds: list[Deed]) -> None:
    for log in fresh():
        written = [log.append(a, action, s, **facts) for a, action, s, facts in deeds]
        assert log.entries() == written
        assert [(e.actor, e.action, e.subject) for e in written] == [d[:3] for d in deeds]
        assert log.verify() == len(deeds)
        assert log.verify(known=written[0]) == len(deeds)


def test_entries_come_in_pages(log: AuditLog, five: list[AuditEntry]) -> None:
    assert log.entries(after=1, limit=2) == five[1:3]
    assert log.entries(after=5) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_any_change_of_any_column_shows(
    store: Store, log: AuditLog, five: list[AuditEntry], data: st.DataObject
) -> None:
    victim = data.draw(st.sampled_from(five))
    name = data.draw(st.sampled_from(COLUMNS))
    right = getattr(victim, name)
    if isinstance(right, bytes):
        wrong: object = bytes([right[0] ^ 1]) + right[1:]
    else:
        wrong = f"{right}x" if isinstance(right, str) else right + 7
    this = audit.c.number == (wrong if name == "number" else victim.number)
    with store.engine.begin() as db:
        db.execute(sa.update(audit).where(audit.c.number == victim.number).values({name: wrong}))
    with pytest.raises(AuditBroken) as caught:
        log.verify()
    assert caught.value.number in (victim.number, victim.number + 1)
    with store.engine.begin() as db:
        db.execute(sa.update(audit).where(this).values({name: right}))
    assert log.verify() == 5


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_removed_entry_shows(
    store: Store, log: AuditLog, five: list[AuditEntry], number: int
) -> None:
    with store.engine.begin() as db:
        db.execute(sa.delete(audit).where(audit.c.number == number))
    with pytest.raises(AuditBroken) as caught:
        log.verify(known=five[-1])
    assert caught.value.number == number


def test_a_chain_written_anew_shows_to_who_kept_an_entry(
    store: Store, log: AuditLog, five: list[AuditEntry]
) -> None:
    with store.engine.begin() as db:
        db.execute(sa.delete(audit))
    for i in range(6):
        log.append("operator eva", Action.RUN_STARTED, f"run-{i}")
    assert log.verify() == 6
    with pytest.raises(AuditBroken, match="entry 5"):
        log.verify(known=five[-1])


@pytest.mark.parametrize("secret", [b"key", bytearray(2), ["list"], object()])
def test_what_may_be_a_key_is_no_fact(log: AuditLog, secret: Fact) -> None:
    with pytest.raises(TypeError):
        log.append("operator eva", Action.RUN_KEY_ROTATED, "run", key=secret)
    assert log.verify() == 0


@pytest.mark.parametrize(
    ("actor", "subject"), [("", "s"), ("a", ""), ("a", "s" * 257), ("a\n", "s"), ("a", "\ud800")]
)
def test_names_are_bounded(log: AuditLog, actor: str, subject: str) -> None:
    with pytest.raises(ValueError, match="256"):
        log.append(actor, Action.RUN_STARTED, subject)
    with pytest.raises(ValueError, match="4096"):
        log.append("a", Action.RUN_STARTED, "s", text="x" * 5000)
    assert log.verify() == 0


def test_processes_that_append_at_once_make_one_chain(store: Store, place: Path | str) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from coordinator.audit import Action, AuditLog; from coordinator.store import Store\n"
        "place = sys.argv[1] if '://' in sys.argv[1] else Path(sys.argv[1])\n"
        "log = AuditLog(Store(place).engine); sys.stdin.read()\n"
        "for i in range(25): log.append(sys.argv[2], Action.AGENT_INVITED, f'agent-{i}')\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(place), f"operator {i}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for i in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]
    log = AuditLog(store.engine)
    assert log.verify() == 75
    for i in range(3):
        mine = [entry.subject for entry in log.entries() if entry.actor == f"operator {i}"]
        assert mine == [f"agent-{n}" for n in range(25)]


def test_the_operator_of_this_machine_has_a_name() -> None:
    assert local_operator().removeprefix("operator ")
