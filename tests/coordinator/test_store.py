"""The store, on SQLite and on PostgreSQL: what was stored is there, once, for every process."""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import schema
from coordinator.run_state import Phase
from coordinator.store import JournalEntry, RoundRecord, Store, Wish
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from tests.coordinator.postgresql import PostgresServer

SUM = ArtifactReference(hashlib.sha256(b"sum").digest(), 3)
OPENED = ArtifactReference(hashlib.sha256(b"opened").digest(), 1 << 40)
ROUND = RoundRecord(1, 2, 64, (0, 2, 5), SUM, 1.5, b"cohort", 3, 0, 0.25)
ENTRIES = [JournalEntry(1.5, "Ready", b"{}"), JournalEntry(1.25, "Tick", bytes(range(256)))]


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here is a law of every kind of store."""
    return any_store


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    phase=st.sampled_from(Phase),
    number=st.integers(1, 100_000),
    attempt=st.integers(0, 65_535),
    reason=st.none() | st.sampled_from(Reason),
)
def test_how_far_a_run_is_comes_back(
    store: Store, run_id: bytes, phase: Phase, number: int, attempt: int, reason: Reason | None
) -> None:
    before = store.run(run_id)
    store.update_run(run_id, phase, number, attempt, reason)
    expected = replace(before, phase=phase, round=number, attempt=attempt, reason=reason)
    assert store.run(run_id) == expected
    assert store.runs() == [expected]


def test_a_new_run_starts_at_its_first_round(store: Store, run_id: bytes) -> None:
    record = store.run(run_id)
    assert (record.phase, record.round, record.attempt) == (Phase.GATHERING, 1, 0)
    assert (record.wish, record.reason, record.name) == (Wish.RUN, None, "intent")


def test_the_operators_wish_is_kept_beside_how_far_the_run_is(store: Store, run_id: bytes) -> None:
    for wish in Wish:
        store.wish(run_id, wish)
        store.update_run(run_id, Phase.TRAINING, 1, 0)
        assert store.run(run_id).wish is wish


def test_runs_are_listed_in_the_order_of_their_start(store: Store) -> None:
    identities = [bytes([number]) * 16 for number in (9, 1, 5)]
    for identity in identities:
        store.add_run(identity, "run", "", SUM, now=0.0)
    assert [record.run_id for record in store.runs()] == identities


def test_an_unknown_run_is_not_found(store: Store) -> None:
    with pytest.raises(Refused) as caught:
        store.run(bytes(16))
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_round_is_added_once(store: Store, run_id: bytes) -> None:
    store.add_round(run_id, ROUND)
    store.add_round(run_id, replace(ROUND, attempt=9, slots=(1,)))
    assert store.rounds(run_id) == (ROUND,)
    store.close_round(run_id, 1, 2.5)
    assert store.rounds(run_id) == (replace(ROUND, seconds=2.5),)
    store.set_opened(run_id, 1, OPENED)
    assert store.rounds(run_id) == (replace(ROUND, seconds=2.5, opened=OPENED),)
    assert store.rounds(bytes(16)) == ()


_identities = (number.to_bytes(16, "big") for number in itertools.count(1 << 100))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.permutations(range(1, 8)))
def test_rounds_come_back_in_order(store: Store, order: list[int]) -> None:
    identity = next(_identities)
    for number in order:
        store.add_round(identity, replace(ROUND, round=number))
    assert [record.round for record in store.rounds(identity)] == list(range(1, 8))


def test_the_journal_keeps_its_order_until_it_is_begun_anew(store: Store, run_id: bytes) -> None:
    assert store.journal(run_id) == []
    for entry in ENTRIES:  # the later one says an earlier time: the order is that of writing
        store.append_journal(run_id, entry)
    store.append_journal(bytes(16), ENTRIES[0])
    assert store.journal(run_id) == ENTRIES
    store.restart_journal(run_id, ENTRIES[1])
    assert store.journal(run_id) == ENTRIES[1:]
    store.restart_journal(run_id, None)
    assert (store.journal(run_id), store.journal(bytes(16))) == ([], ENTRIES[:1])


def test_envelopes_belong_to_one_key(store: Store, run_id: bytes) -> None:
    store.put_envelopes(run_id, 1, {"a": b"a1", "b": b"b1"})
    store.put_envelopes(run_id, 2, {"b": b"b2"})
    assert store.envelopes(run_id) == {1: {"a": b"a1", "b": b"b1"}, 2: {"b": b"b2"}}
    store.put_envelopes(run_id, 2, {"b": b"again", "c": b"c2"})
    assert store.envelopes(run_id)[2] == {"b": b"again", "c": b"c2"}
    assert store.envelopes(bytes(16)) == {}


def test_no_envelopes_are_no_fault(store: Store, run_id: bytes) -> None:
    """An agent that wraps the key for nobody must not stop the coordinator."""
    store.put_envelopes(run_id, 1, {})
    assert store.envelopes(run_id) == {}


def test_reports_of_one_agent_add_up(store: Store, run_id: bytes) -> None:
    store.report(run_id, 1, "a", progress=0.5)
    store.report(run_id, 2, "a", progress=0.1)
    store.report(run_id, 1, "b", refusal=19)
    store.report(run_id, 1, "a", progress=1.0, training_loss=0.25, correct=2**62 - 1)
    rows = store.reports(run_id)
    assert [(row["round"], row["agent_id"]) for row in rows] == [(1, "a"), (1, "b"), (2, "a")]
    assert (rows[0]["progress"], rows[0]["training_loss"]) == (1.0, 0.25)
    assert rows[0]["correct"] == 2**62 - 1
    assert rows[0]["refusal"] is None
    assert rows[1]["refusal"] == 19


def test_reports_of_many_agents_add_up_at_once(store: Store, run_id: bytes) -> None:
    store.report(run_id, 1, "a", progress=0.5, sent_bytes=1)
    rows = [{"agent_id": agent, "sent_bytes": 2**40, "received_bytes": 5} for agent in "ab"]
    store.report_all(run_id, 1, rows)
    store.report_all(run_id, 1, [])
    found = [(r["agent_id"], r["progress"], r["sent_bytes"]) for r in store.reports(run_id)]
    assert found == [("a", 0.5, 2**40), ("b", None, 2**40)]


def test_an_agent_took_part_once_it_reported(store: Store, run_id: bytes) -> None:
    store.report(run_id, 1, "a", progress=0.5)
    assert store.took_part(run_id, "a")
    assert not store.took_part(run_id, "b")
    assert not store.took_part(bytes(16), "a")


def fill(store: Store, run_id: bytes) -> None:
    """Write something of everything that is known of a run."""
    store.update_run(run_id, Phase.COLLECTING, 2, 7)
    store.add_round(run_id, ROUND)
    store.append_journal(run_id, ENTRIES[0])
    store.put_envelopes(run_id, 1, {"a": b"opaque"})
    store.report(run_id, 1, "a", progress=1.0)


def known(store: Store, run_id: bytes) -> list[Any]:
    """Return everything that is known of a run."""
    run = [record for record in store.runs() if record.run_id == run_id]
    rest = (store.rounds, store.journal, store.envelopes, store.reports)
    return [run, *(read(run_id) for read in rest)]


def test_a_run_that_is_over_is_forgotten_whole_and_alone(store: Store, run_id: bytes) -> None:
    other = bytes(16)
    store.add_run(other, "other", "", SUM, now=0.0)
    fill(store, run_id)
    fill(store, other)
    kept, open_run = known(store, other), known(store, run_id)
    with pytest.raises(Refused) as caught:
        store.forget_run(run_id)
    assert caught.value.reason is Reason.NOT_FOUND
    assert known(store, run_id) == open_run
    store.update_run(run_id, Phase.FAILED, 2, 7, Reason.INTERNAL)
    store.forget_run(run_id)
    assert not any(known(store, run_id))
    assert known(store, other) == kept


def test_everything_is_there_after_a_restart(
    place: Path | str, store: Store, run_id: bytes
) -> None:
    fill(store, run_id)
    before = known(store, run_id)
    store.close()
    again = Store(place)
    assert known(again, run_id) == before
    assert again.run(run_id).attempt == 7
    again.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.run_state import Phase
from coordinator.store import Store
place = sys.argv[1]
store = Store(place if "://" in place else Path(place))
for attempt in range(1, 21):
    store.update_run(bytes(range(16)), Phase.COLLECTING, 1, attempt)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_process_writes_and_a_kill_loses_nothing(
    place: Path | str, store: Store, run_id: bytes
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(place)], timeout=60, check=False)
    assert killed.returncode == -9
    assert store.run(run_id).attempt == 20


def test_threads_and_stores_share_one_database(
    place: Path | str, store: Store, run_id: bytes
) -> None:
    other = Store(place)

    def work(number: int) -> None:
        mine = (store, other)[number % 2]
        mine.report(run_id, number % 20, "a", progress=number / 100)
        mine.append_journal(run_id, replace(ENTRIES[0], at=float(number)))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(40)))
    assert len(other.reports(run_id)) == 20
    assert sorted(entry.at for entry in other.journal(run_id)) == list(range(40))
    other.close()


def test_a_file_is_in_wal_mode(store_path: Path) -> None:
    Store(store_path).close()
    engine = sa.create_engine(f"sqlite:///{store_path}")
    with engine.connect() as db:
        assert db.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"
    engine.dispose()


# an oracle: whatever is asked of both kinds in the same order, they answer the same

RUNS = st.integers(0, 2).map(lambda number: bytes([number]) * 16)
ROUNDS = st.integers(1, 3)
AGENTS = st.sampled_from(["a", "b"])
BYTES = st.binary(max_size=40)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 2**62)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
REFERENCES = st.builds(ArtifactReference, st.binary(min_size=32, max_size=32), COUNTS)
RECORDS = st.builds(
    RoundRecord,
    round=ROUNDS,
    attempt=st.integers(0, 2**31 - 1),
    weight_cap=st.integers(1, 1 << 24),
    slots=st.lists(st.integers(0, 255), max_size=4).map(tuple),
    sum=REFERENCES,
    seconds=FLOATS,
    cohort_digest=BYTES,
    key_id=ROUNDS,
    previous_round=st.integers(0, 3),
    clip=FLOATS,
    opened=st.none(),
)
REPORTS = st.fixed_dictionaries(
    {"progress": FLOATS},
    optional={"correct": COUNTS, "state_sha256": BYTES, "training_loss": FLOATS},
)
JOURNAL = st.builds(JournalEntry, FLOATS, TEXTS, BYTES)
Step = Callable[[Store], Any]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        lambda *given: lambda store: store.add_run(*given),
        *(RUNS, TEXTS, TEXTS, REFERENCES, FLOATS),
    ),
    st.builds(
        lambda *given: lambda store: store.update_run(*given),
        *(RUNS, st.sampled_from(Phase), ROUNDS, ROUNDS, st.none() | st.sampled_from(Reason)),
    ),
    st.builds(lambda *given: lambda store: store.wish(*given), RUNS, st.sampled_from(Wish)),
    st.builds(lambda *given: lambda store: store.add_round(*given), RUNS, RECORDS),
    st.builds(lambda *given: lambda store: store.set_opened(*given), RUNS, ROUNDS, REFERENCES),
    st.builds(lambda *given: lambda store: store.append_journal(*given), RUNS, JOURNAL),
    st.builds(
        lambda *given: lambda store: store.restart_journal(*given), RUNS, st.none() | JOURNAL
    ),
    st.builds(
        lambda *given: lambda store: store.put_envelopes(*given),
        *(RUNS, ROUNDS, st.dictionaries(AGENTS, BYTES)),
    ),
    st.builds(
        lambda run, number, agent, values: lambda store: store.report(run, number, agent, **values),
        *(RUNS, ROUNDS, AGENTS, REPORTS),
    ),
    st.builds(lambda run: lambda store: store.run(run), RUNS),
    st.builds(lambda run: lambda store: store.forget_run(run), RUNS),
)


def answer(store: Store, step: Step) -> Any:
    """Return what the store says, or the kind of its refusal."""
    try:
        return step(store)
    except Refused as refused:
        return refused.reason
    except sa.exc.IntegrityError:
        return "there is one already"


@pytest.fixture
def pair(tmp_path: Path, postgresql: PostgresServer) -> Iterator[dict[sa.Engine, Store]]:
    """A store of each kind, and a way past it to empty its tables."""
    with postgresql.database() as url:
        places = {f"sqlite:///{tmp_path / 'pair.sqlite'}": tmp_path / "pair.sqlite", url: url}
        stores = {sa.create_engine(url): Store(place) for url, place in places.items()}
        yield stores
        for engine, store in stores.items():
            engine.dispose()
            store.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(steps=st.lists(STEPS, max_size=30))
def test_both_kinds_answer_the_same(pair: dict[sa.Engine, Store], steps: list[Step]) -> None:
    for engine in pair:
        with engine.begin() as db:
            for table in schema.METADATA.sorted_tables:
                db.execute(sa.delete(table))
    ours, theirs = pair.values()
    for step in steps:
        assert answer(ours, step) == answer(theirs, step)
    assert ours.runs() == theirs.runs()
    for run_id in (bytes([number]) * 16 for number in range(3)):
        assert known(ours, run_id) == known(theirs, run_id)
