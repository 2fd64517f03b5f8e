"""The store: what was stored is there after a restart."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.run_state import Phase
from coordinator.store import RoundRecord, Store
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused

SUM = ArtifactReference(hashlib.sha256(b"sum").digest(), 3)
ROUND = RoundRecord(1, 2, 64, (0, 2, 5), SUM, 1.5)


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
    assert (record.key_id, record.reason, record.name) == (0, None, "intent")


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
    store.set_round_seconds(run_id, 1, 2.5)
    assert store.rounds(run_id) == (replace(ROUND, seconds=2.5),)
    assert store.rounds(bytes(16)) == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.permutations(range(1, 8)))
def test_rounds_come_back_in_order(store_path: Path, order: list[int]) -> None:
    store_path.unlink(missing_ok=True)
    store = Store(store_path)
    for number in order:
        store.add_round(bytes(16), replace(ROUND, round=number))
    assert [record.round for record in store.rounds(bytes(16))] == list(range(1, 8))
    store.close()


def test_envelopes_belong_to_one_key(store: Store, run_id: bytes) -> None:
    assert (store.next_key_id(run_id), store.next_key_id(run_id)) == (1, 2)
    assert store.run(run_id).key_id == 2
    store.put_envelopes(run_id, 1, [("a", b"a1"), ("b", b"b1")])
    store.put_envelopes(run_id, 2, [("b", b"b2")])
    assert store.envelopes(run_id, 1) == {"a": b"a1"}
    assert store.envelopes(run_id, 2) == {"b": b"b2"}
    store.put_envelopes(run_id, 2, [("b", b"again"), ("c", b"c2")])
    assert store.envelopes(run_id, 2) == {"b": b"again", "c": b"c2"}


def test_no_envelopes_are_no_fault(store: Store, run_id: bytes) -> None:
    """An agent that wraps the key for nobody must not stop the coordinator."""
    store.put_envelopes(run_id, 1, [])
    assert store.envelopes(run_id, 1) == {}


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


def test_everything_is_there_after_a_restart(store_path: Path, store: Store, run_id: bytes) -> None:
    store.update_run(run_id, Phase.COLLECTING, 2, 7)
    store.add_round(run_id, ROUND)
    store.put_envelopes(run_id, store.next_key_id(run_id), [("a", b"opaque")])
    store.report(run_id, 1, "a", progress=1.0)
    before = (store.runs(), store.rounds(run_id), store.reports(run_id))
    store.close()
    again = Store(store_path)
    assert (again.runs(), again.rounds(run_id), again.reports(run_id)) == before
    assert again.run(run_id).attempt == 7
    assert again.envelopes(run_id, 1) == {"a": b"opaque"}
    again.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.run_state import Phase
from coordinator.store import Store
store = Store(Path(sys.argv[1]))
for attempt in range(1, 21):
    store.update_run(bytes(range(16)), Phase.COLLECTING, 1, attempt)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_process_writes_and_a_kill_loses_nothing(
    store_path: Path, store: Store, run_id: bytes
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store_path)], timeout=60, check=False
    )
    assert killed.returncode == -9
    assert store.run(run_id).attempt == 20


def test_threads_and_stores_share_one_file(store_path: Path, store: Store, run_id: bytes) -> None:
    other = Store(store_path)

    def work(number: int) -> int:
        mine = (store, other)[number % 2]
        mine.report(run_id, number, "a", progress=number / 100)
        return mine.next_key_id(run_id)

    with ThreadPoolExecutor(6) as pool:
        key_ids = list(pool.map(work, range(40)))
    assert sorted(key_ids) == list(range(1, 41))
    assert len(other.reports(run_id)) == 40
    other.close()


def test_the_file_is_in_wal_mode(store_path: Path, store: Store) -> None:
    engine = sa.create_engine(f"sqlite:///{store_path}")
    with engine.connect() as db:
        assert db.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"
    engine.dispose()
