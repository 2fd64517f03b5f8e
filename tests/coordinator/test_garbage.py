"""Garbage: what a run refers to stays for as long as the run does, and everything else goes."""

import asyncio
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import garbage
from coordinator.bucket import PublishedBucket
from coordinator.faults import StorageFault
from coordinator.garbage import GRACE_SECONDS, Collected, collect, collect_daily
from coordinator.published import Published, PublishedFolder
from coordinator.run_state import Phase
from coordinator.store import RoundRecord, Store
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Refused
from fedloom.plans import PLAN_FILE
from tests.coordinator.samples import PlanFolder

LATER = GRACE_SECONDS + 60.0


@dataclass(frozen=True)
class Home:
    """What a coordinator keeps."""

    store: Store
    published: Published
    spool: Path

    def collect(self, ahead: float = LATER) -> Collected:
        return collect(self.store, self.published, self.spool, time.time() + ahead)

    def put(self, text: str) -> ArtifactReference:
        return self.published.put(iter([text.encode()]))

    def start(self, number: int, plan: ArtifactReference) -> bytes:
        run_id = bytes([number]) * 16
        self.store.add_run(run_id, f"run {number}", "", plan, now=0.0)
        return run_id

    def add_round(self, run_id: bytes, number: int, opened: bool = False) -> set[bytes]:
        """Finish a round of a run; return what it refers to."""
        total = self.put(f"sum {number} of {run_id.hex()}")
        self.store.add_round(run_id, RoundRecord(number, 1, 1, (0,), total))
        if not opened:
            return {total.sha256}
        returned = self.put(f"opened {number} of {run_id.hex()}")
        self.store.set_opened(run_id, number, returned)
        return {total.sha256, returned.sha256}

    def names(self) -> set[bytes]:
        return {artifact.sha256 for artifact in self.published.artifacts()}


@pytest.fixture
def home(store: Store, published: Published, tmp_path: Path) -> Home:
    return Home(store, published, tmp_path / "home" / "spool")


def members(plan_folder: PlanFolder, reference: ArtifactReference) -> set[bytes]:
    return {member.sha256 for member in plan_folder.plan.members} | {reference.sha256}


def another_plan(plan_folder: PlanFolder) -> Path:
    """Return a second plan's folder, which shares all members but one with the first."""
    folder = plan_folder.folder.with_name("another")
    folder.mkdir()
    plan = plan_folder.plan
    for member in plan.members[1:]:
        os.link(plan_folder.folder / member.name, folder / member.name)
    (folder / PLAN_FILE).write_bytes(replace(plan, name="2", members=plan.members[1:]).encode())
    return folder


def test_what_runs_refer_to_stays_and_the_rest_goes(home: Home, plan_folder: PlanFolder) -> None:
    _, plan = home.published.put_plan(plan_folder.folder)
    kept = members(plan_folder, plan)
    for number, phase in enumerate((Phase.COMPLETED, Phase.FAILED, Phase.TRAINING)):
        run_id = home.start(number, plan)
        home.store.update_run(run_id, phase, 2, 0)
        kept |= home.add_round(run_id, 1, opened=number == 0) | home.add_round(run_id, 2)
    home.start(9, plan)
    home.put("a sum whose round was abandoned")
    home.put("another")
    assert home.collect(GRACE_SECONDS - 60) == Collected(0, 0, 0, 0)  # all of it is young
    collected = home.collect()
    assert (collected.artifacts, collected.artifact_bytes) == (2, 38)
    assert home.names() == kept
    assert home.collect() == Collected(0, 0, 0, 0)


def test_of_a_forgotten_run_stays_what_others_share(home: Home, plan_folder: PlanFolder) -> None:
    _, first = home.published.put_plan(plan_folder.folder)
    _, second = home.published.put_plan(another_plan(plan_folder))
    gone, stays = home.start(1, first), home.start(2, second)
    home.add_round(gone, 1)
    sums = home.add_round(stays, 1)
    home.store.update_run(gone, Phase.FAILED, 2, 0)
    home.store.forget_run(gone)
    home.collect()
    shared = {member.sha256 for member in plan_folder.plan.members[1:]}
    assert home.names() == shared | {second.sha256} | sums


def test_what_is_published_again_is_young_again(
    store: Store, plan_folder: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a forgotten run is started anew while the collector looks at what is old."""
    home = Home(store, PublishedFolder(tmp_path / "artifacts"), tmp_path / "spool")
    _, plan = home.published.put_plan(plan_folder.folder)
    listed = list(home.published.artifacts())
    moment = max(artifact.published_at for artifact in listed)
    time.sleep(0.02)  # the clock of a file system is coarse
    home.published.put_plan(plan_folder.folder)
    monkeypatch.setattr(PublishedFolder, "artifacts", lambda self: iter(listed))
    monkeypatch.setattr(garbage, "GRACE_SECONDS", 0.0)
    collected = collect(store, home.published, home.spool, now=moment + 0.001)
    assert collected.artifacts == 0
    assert home.published.has_plan(plan_folder.plan)
    assert home.published.read_plan(plan) == plan_folder.plan


def test_nobody_publishes_between_the_last_look_and_the_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = PublishedFolder(tmp_path)
    reference = published.put(iter([b"sum"]))
    putting = threading.Thread(target=lambda: published.put(iter([b"sum"])))
    looked, stat = published.path(reference.sha256).stat(), Path.stat

    def stat_and_let_others_in(path: Path, **options: bool) -> os.stat_result:
        if path.name != reference.sha256.hex():
            return stat(path, **options)
        putting.start()
        putting.join(0.2)
        assert putting.is_alive(), "expected the publisher to wait"
        return looked

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", stat_and_let_others_in)
        assert published.delete(reference.sha256, looked.st_ctime + 1)
    putting.join()
    assert published.size(reference.sha256) == 3


def test_while_the_plan_of_an_open_run_cannot_be_read_nothing_is_deleted(
    home: Home, plan_folder: PlanFolder
) -> None:
    _, plan = home.published.put_plan(plan_folder.folder)
    over, open_run = home.start(1, plan), home.start(2, plan)
    home.store.update_run(over, Phase.COMPLETED, 1, 0)
    home.published.delete(plan.sha256, time.time() + 60)
    before = home.names()
    with pytest.raises(Refused):
        home.collect()
    assert home.names() == before
    home.store.update_run(open_run, Phase.FAILED, 1, 0)
    home.collect()
    assert home.names() == set()  # no run can be opened with it any more


def test_what_killed_processes_left_goes_once_it_is_old(
    home: Home, plan_folder: PlanFolder
) -> None:
    _, plan = home.published.put_plan(plan_folder.folder)
    if isinstance(home.published, PublishedFolder):
        (home.published.folder / "0123456789abcdef.part").write_bytes(b"half")
        (home.published.folder / "readme").write_bytes(b"somebody else's")
    else:
        assert isinstance(home.published, PublishedBucket)
        key = {"Key": home.published._key(bytes(32))}
        home.published._client.create_multipart_upload(**home.published._bucket, **key)
    over, open_run = home.start(1, plan), home.start(2, plan)
    home.store.update_run(over, Phase.COMPLETED, 1, 0)
    for run in (over, open_run, bytes(16)):
        (home.spool / run.hex()).mkdir(parents=True)
        (home.spool / run.hex() / "0.abc.part").write_bytes(b"half")
    assert home.collect(0.0).spools == 0  # the agent of a late upload may be at it still
    assert home.collect().spools == 2
    assert [folder.name for folder in home.spool.iterdir()] == [open_run.hex()]
    if isinstance(home.published, PublishedFolder):
        others = [p.name for p in home.published.folder.iterdir() if len(p.name) != 64]
        assert others == ["readme"]
    else:
        assert not list(home.published._listed("list_multipart_uploads", "Uploads"))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "round", "opened", "finish", "forget", "orphan", "collect"]),
        st.integers(0, 2),  # a run, in the order of their start
        st.integers(0, 1),  # a plan
    ),
    max_size=25,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(steps=STEPS)
def test_what_is_referred_to_is_what_is_left(
    store: Store,
    plan_folder: PlanFolder,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int]],
) -> None:
    """An oracle that counts references by hand agrees after any history."""
    folder = tmp_path_factory.mktemp("home")
    home = Home(store, PublishedFolder(folder / "artifacts"), folder / "spool")
    again = plan_folder.folder.with_name("another")
    folders = (plan_folder.folder, again if again.exists() else another_plan(plan_folder))
    for run in store.runs():  # of the example before
        store.update_run(run.run_id, Phase.FAILED, 1, 0)
        store.forget_run(run.run_id)
    referred: dict[bytes, set[bytes]] = {}  # by run
    for number, (step, which, plan) in enumerate(steps):
        runs = [*referred]
        run_id = runs[which % len(runs)] if runs else None
        if step == "start":
            read, reference = home.published.put_plan(folders[plan])
            run_id = home.start(number, reference)
            referred[run_id] = {reference.sha256, *(member.sha256 for member in read.members)}
        elif step == "orphan":
            home.put(f"orphan {number}")
        elif step == "collect":
            home.collect()
            assert home.names() == set().union(*referred.values())
        elif run_id is None:
            continue
        elif step in ("round", "opened"):
            referred[run_id] |= home.add_round(run_id, number, step == "opened")
        elif step == "finish":
            store.update_run(run_id, Phase.COMPLETED, 1, 0)
        elif store.run(run_id).phase.over:
            store.forget_run(run_id)
            del referred[run_id]


async def test_it_is_collected_at_the_start_and_again_after_a_fault(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def collect_or_fail(store: Store, published: Published, spool: Path, now: float) -> Collected:
        asked.append(now)
        if len(asked) == 1:
            raise StorageFault("store", "away")
        loop.call_soon_threadsafe(done.set)
        return Collected(0, 0, 0, 0)

    monkeypatch.setattr(garbage, "collect", collect_or_fail)
    monkeypatch.setattr(garbage, "INTERVAL_SECONDS", 0.0)
    collecting = asyncio.create_task(collect_daily(home.store, home.published, home.spool))
    await asyncio.wait_for(done.wait(), 60)
    collecting.cancel()
    assert len(asked) >= 2
