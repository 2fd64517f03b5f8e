"""What an operator can do, without anything that carries the request."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crypto
from coordinator.export import Model
from coordinator.membership import Membership
from coordinator.operations import Operations
from coordinator.published import Published, PublishedFolder
from coordinator.run_checks import (
    UPDATE_BYTES_MORE,
    UPDATE_BYTES_PER_VALUE,
    RunFile,
    Surroundings,
    check,
)
from coordinator.run_state import Phase, RunState, Wish
from coordinator.store import RoundRecord, Store
from coordinator.summaries import Page, page
from fedloom.adapters import read_adapter
from fedloom.artifacts import ArtifactReference
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, TrainableTensor
from fedloom.quality import DEFAULT_EVALUATION, tail_length
from fedloom.tasks import ArrayInput, ArrayLearning
from fedloom.terms import Protection, Release
from tests.coordinator.samples import LAYOUT, POLICY, PlanFolder

PLAIN = 'plan = "plan"\nrounds = 2\n[cohort]\nminimum = 1\n[protection]\nkind = "plain"\n'
RUN_ID = bytes(range(16))


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return PublishedFolder(tmp_path / "artifacts")


@pytest.fixture
def operations(store: Store, published: Published, tmp_path: Path) -> Operations:
    members = Membership(store.roster, "localhost:7072", b"authority")
    return Operations(store, published, members, tmp_path / "spool", False)


def run_file(folder: PlanFolder, text: str = PLAIN) -> RunFile:
    return RunFile(text, "intent.toml", folder.folder.parent)


def start(operations: Operations, folder: PlanFolder, run_id: bytes = RUN_ID) -> None:
    assert operations.start_run(run_id, run_file(folder)).problems == ()


def around(plan: Plan | None = None, **known: object) -> Surroundings:
    least = {"enrolled_agents": 5, "free_bytes": 1 << 40, "open_names": {}}
    return Surroundings(**(least | known), known_plan=lambda prefix: plan)  # type: ignore[arg-type]


# starting


def test_a_plateau_needs_a_metric_of_the_plan(plan_folder: PlanFolder) -> None:
    text = (
        PLAIN.replace("plan =", "# plan =", 1) + '[evaluation]\npatience = 2\nmetric = "accuracy"\n'
    )
    text = f'plan = "{"ab" * 32}"\n' + text
    inputs = (ArrayInput("features", (4,)),)
    for task, expected in (
        (ArrayLearning(inputs, values=2), ["mean_squared_error, loss; found accuracy"]),
        (ArrayLearning(inputs, ("a", "b")), []),
    ):
        plan = replace(plan_folder.plan, task=task)
        found = check(RunFile(text, "run.toml", None), around(plan)).problems
        assert [problem.partition("this plan's, ")[2] for problem in found] == expected


def test_a_gate_of_accuracy_needs_labels(plan_folder: PlanFolder) -> None:
    inputs = (ArrayInput("features", (4,)),)
    text = PLAIN.replace("plan =", "# plan =", 1) + "[activation]\nminimum_accuracy = 0.5\n"
    text = f'plan = "{"ab" * 32}"\n' + text
    for task, problems in (
        (ArrayLearning(inputs, values=2), 1),
        (ArrayLearning(inputs, ("a", "b")), 0),
    ):
        plan = replace(plan_folder.plan, task=task)
        found = check(RunFile(text, "run.toml", plan_folder.folder.parent), around(plan))
        assert len(found.problems) == problems, found.problems
        assert all("bounds of the loss" in problem for problem in found.problems)


def test_a_run_is_named_by_its_file_and_queued(
    operations: Operations, plan_folder: PlanFolder, published: Published
) -> None:
    found = operations.start_run(RUN_ID, run_file(plan_folder))
    assert found.run is not None
    assert (found.run.name, found.run.phase, found.run.round) == ("intent", Phase.GATHERING, 1)
    assert (found.run.completed, found.run.rounds, found.run.agents) == (0, 2, 0)
    assert (found.run.protection, found.run.release) == (Protection.PLAIN, Release.AGENTS)
    assert published.has_plan(plan_folder.plan)
    assert operations.runs("", 0, "").items == (found.run,)


def test_a_repeat_starts_nothing_and_another_file_is_refused(
    operations: Operations, plan_folder: PlanFolder, store: Store
) -> None:
    first = operations.start_run(RUN_ID, run_file(plan_folder))
    shutil.rmtree(plan_folder.folder)  # what was started needs its folder no more
    again = operations.start_run(RUN_ID, run_file(plan_folder))
    assert (again.run, again.problems) == (first.run, ())
    with pytest.raises(Refused) as caught:
        operations.start_run(RUN_ID, run_file(plan_folder, PLAIN + "\n"))
    assert caught.value.reason is Reason.MALFORMED
    assert len(store.runs()) == 1


def test_every_problem_is_named_at_once_and_nothing_is_stored(
    operations: Operations, plan_folder: PlanFolder, store: Store, published: Published
) -> None:
    (plan_folder.folder / INFER_GRAPH).write_bytes(b"spoilt")
    text = 'plan = "plan"\nrounds = 0\nname = "x"\ntypo = 1\n[cohort]\nminimum = 0\n'
    found = operations.start_run(RUN_ID, run_file(plan_folder, text))
    assert found.run is None
    told = "\n".join(found.problems)
    for problem in ("rounds: expected 1..", "typo: unknown key", "cohort: expected", INFER_GRAPH):
        assert problem in told
    assert store.runs() == []
    assert list(published.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rounds = [", "is not TOML"),
        ("rounds = 1", "plan: expected the folder of a plan"),
        ('plan = "nowhere"\nrounds = 1', "expected plan.binpb in the plan folder"),
        ('plan = "a\\u0000b"\nrounds = 1', "plan: expected the folder of a plan"),
        (f'plan = "{"ab" * 32}"\nrounds = 1', "expected the id of one known plan"),
        ("#" * (1 << 20) + "#", "expected at most 1048576 bytes"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    found = check(RunFile(text, "run.toml", tmp_path), around())
    assert problem in "; ".join(found.problems)


def test_a_run_file_from_elsewhere_names_what_the_coordinator_has(plan_folder: PlanFolder) -> None:
    plan_id = hashlib.sha256(plan_folder.plan.encode()).hexdigest()
    knows = around(plan_folder.plan)
    by_id = check(RunFile(PLAIN.replace('"plan"', f'"{plan_id[:12]}"'), "r.toml", None), knows)
    assert (by_id.problems, by_id.plan, by_id.plan_folder) == ([], plan_folder.plan, None)
    absolute = PLAIN.replace('"plan"', f'"{plan_folder.folder}"')
    assert check(RunFile(absolute, "r.toml", None), knows).problems == []
    relative = check(RunFile(PLAIN, "r.toml", None), knows)
    assert len(relative.problems) == 1
    assert "absolute path on its machine, found 'plan'" in relative.problems[0]


@pytest.mark.parametrize(
    ("surroundings", "problem", "warning"),
    [
        (around(), "", ""),
        (around(enrolled_agents=0), "", "cohort.minimum: 1 agents are needed, 0 are enrolled"),
        (around(open_names={"intent": "ab12"}), "", "run ab12 of the same name is not over"),
        (around(free_bytes=100_000), "", "the disk of the spool may become full"),
        (around(free_bytes=1), "the disk of the spool is too full", ""),
    ],
)
def test_what_only_the_coordinator_knows(
    plan_folder: PlanFolder, surroundings: Surroundings, problem: str, warning: str
) -> None:
    found = check(run_file(plan_folder), surroundings)
    for texts, expected in ((found.problems, problem), (found.warnings, warning)):
        assert len(texts) == bool(expected)
        assert expected in "; ".join(texts)


SCAFFOLD = """name = "drift"
plan = "{plan}"
rounds = 2
[cohort]
size = 3
population = 7
[training]
strategy = "scaffold"
optimizer = "sgd"
weighting = "uniform"
local_steps = 3
[protection]
kind = "plain"
"""


@pytest.mark.parametrize(
    ("enrolled", "problem", "warning"),
    [
        (7, "", ""),
        (8, "cohort.population: expected at least the 8 agents that are enrolled, found 7", ""),
        (6, "", "cohort.population: 7 agents are stated, 6 are enrolled"),
    ],
)
def test_a_population_is_compared_with_who_is_enrolled(
    plan_folder: PlanFolder, enrolled: int, problem: str, warning: str
) -> None:
    text = SCAFFOLD.format(plan="plan")
    found = check(run_file(plan_folder, text), around(enrolled_agents=enrolled))
    for texts, expected in ((found.problems, problem), (found.warnings, warning)):
        assert len(texts) == bool(expected)
        assert expected in "; ".join(texts)


def test_an_update_takes_the_room_of_what_the_strategy_sends(plan_folder: PlanFolder) -> None:
    layout = (TrainableTensor("weight", (1_000_000,), 0),)
    plan = replace(plan_folder.plan, layout=layout)
    known = around(plan, enrolled_agents=7, free_bytes=20_000_000)  # 3 updates of 4 MB, or of 8
    text = SCAFFOLD.format(plan="ab" * 32)
    assert "the disk of the spool is too full" in "; ".join(
        check(RunFile(text, "r.toml", None), known).problems
    )
    plain = text.replace('strategy = "scaffold"\n', "").replace("population = 7\n", "")
    assert check(RunFile(plain, "r.toml", None), known).problems == []


@settings(max_examples=25)
@given(
    st.integers(1, 70_000),
    st.sampled_from(["plain", "masked", "encrypted", "sealed"]),
    st.sampled_from([8, 16]),
)
def test_no_update_needs_more_room_than_is_asked_for(
    parameters: int, name: crypto.ProtectionName, bits: int
) -> None:
    digest = bytes(32 if name in ("masked", "sealed") else 0)
    context = crypto.UpdateContext(
        RUN_ID, 1, 1, parameters, 100, 128, 0.1, update_bits=bits, cohort=digest
    )
    size = crypto.protection(name).accumulator(context).encoded_update_size
    assert size <= UPDATE_BYTES_PER_VALUE * parameters + UPDATE_BYTES_MORE


# wishes


@pytest.mark.parametrize("wish", Wish)
def test_a_wish_is_stored_and_a_repeat_changes_nothing(
    operations: Operations, plan_folder: PlanFolder, store: Store, wish: Wish
) -> None:
    start(operations, plan_folder)
    assert operations.wish(RUN_ID, wish) == operations.wish(RUN_ID, wish)
    assert store.run(RUN_ID).wish is wish


def test_what_is_cancelled_or_over_stays_so(
    operations: Operations, plan_folder: PlanFolder, store: Store
) -> None:
    start(operations, plan_folder)
    operations.wish(RUN_ID, Wish.CANCEL)
    for wish in (Wish.RUN, Wish.PAUSE):
        with pytest.raises(ConfigError, match="shall be cancelled already"):
            operations.wish(RUN_ID, wish)
    store.update_run(RUN_ID, Phase.FAILED, 1, 0, Reason.RUN_CANCELLED)
    for wish in Wish:
        with pytest.raises(ConfigError, match="is cancelled already"):
            operations.wish(RUN_ID, wish)
    with pytest.raises(Refused) as caught:
        operations.wish(bytes(16), Wish.PAUSE)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("phase", "reason", "wish", "told"),
    [
        (Phase.GATHERING, None, Wish.PAUSE, "paused"),
        (Phase.TRAINING, None, Wish.PAUSE, "training, then paused"),
        (Phase.TRAINING, None, Wish.CANCEL, "being cancelled"),
        (Phase.TRAINING, None, Wish.RUN, "training"),
        (Phase.COMPLETED, None, Wish.PAUSE, "completed"),
        (Phase.FAILED, Reason.RUN_CANCELLED, Wish.CANCEL, "cancelled"),
        (Phase.FAILED, Reason.STATE_DIVERGED, Wish.RUN, "failed"),
    ],
)
def test_the_state_of_a_run_in_words(
    operations: Operations,
    plan_folder: PlanFolder,
    phase: Phase,
    reason: Reason | None,
    wish: Wish,
    told: str,
) -> None:
    start(operations, plan_folder)
    run = replace(operations.run(RUN_ID), phase=phase, reason=reason, wish=wish)
    assert run.state == told


# lists


@given(st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=12), st.integers(1, 5))
def test_the_pages_of_a_list_are_the_list(items: list[str], size: int) -> None:
    seen: list[str] = []
    token = ""
    for _ in range(len(items) + 1):
        found: Page[str] = page(items, str, size, token)
        assert len(found.items) <= size
        seen += found.items
        if not (token := found.next_token):
            break
    assert seen == items
    assert not token


def test_a_page_that_nothing_leads_to_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        page(["a", "b"], str, 1, "c")
    assert caught.value.reason is Reason.MALFORMED


def test_pages_are_bounded_whatever_is_asked_for() -> None:
    items = [str(number) for number in range(2000)]
    assert len(page(items, str, 0, "").items) == 100
    assert len(page(items, str, 1 << 31, "").items) == 1000


def test_runs_are_listed_newest_first_and_found_by_the_start_of_their_id(
    operations: Operations, plan_folder: PlanFolder
) -> None:
    ids = [bytes([number]) * 16 for number in (1, 2, 17)]
    for run_id in ids:
        start(operations, plan_folder, run_id)
    assert [run.run_id for run in operations.runs("", 0, "").items] == ids[::-1]
    assert [run.run_id for run in operations.runs("1", 0, "").items] == [ids[2]]
    first = operations.runs("", 2, "")
    rest = operations.runs("", 2, first.next_token)
    assert [run.run_id for run in (*first.items, *rest.items)] == ids[::-1]


def test_a_run_of_an_older_version_hides_no_other(
    operations: Operations, plan_folder: PlanFolder, store: Store
) -> None:
    start(operations, plan_folder)
    store.add_run(bytes(16), "old", "meaning = 42", ArtifactReference(bytes(32), 1), 1.0)
    old, new = operations.runs("", 0, "").items
    assert (old.name, old.rounds, old.protection, old.release) == ("old", 0, None, None)
    assert old.to_json()["protection"] is None
    assert new.run_id == RUN_ID
    assert operations.watch(bytes(16), 10)().coordinator_reads == ""
    for ask in (operations.privacy, operations.model):
        with pytest.raises((ConfigError, Refused)):
            ask(bytes(16))


# plans


def test_plans_are_those_of_the_runs_and_show_what_is_wrong_with_them(
    operations: Operations, plan_folder: PlanFolder, published: Published
) -> None:
    assert operations.plans.list(0, "").items == ()
    start(operations, plan_folder)
    start(operations, plan_folder, bytes(16))
    (found,) = operations.plans.list(0, "").items
    assert (found.name, found.parameters, found.labels, found.runs) == ("toy", 8, 2, 2)
    assert dict(found.files)[INFER_GRAPH] == len(INFER_GRAPH) * 100
    prefix = found.plan_id.hex()[:6]
    assert operations.plans.verified(prefix) == found
    member = published.path(plan_folder.plan.member(INFER_GRAPH).sha256)
    member.unlink()  # a second name of the operator's own file
    member.write_bytes(b"spoilt")
    assert operations.plans.list(0, "").items == (found,)  # a list does not read gigabytes
    assert operations.plans.verified(prefix).damage == f"{INFER_GRAPH} is not what its SHA-256 says"
    member.unlink()
    assert operations.plans.list(0, "").items[0].damage == f"{INFER_GRAPH} is missing"
    assert operations.plans.known(prefix) is None
    for wrong in ("", prefix[:3], "ffff"):
        with pytest.raises(Refused) as caught:
            operations.plans.verified(wrong)
        assert caught.value.reason is Reason.NOT_FOUND


# members


def test_an_invitation_is_remembered_once_and_can_be_revoked(operations: Operations) -> None:
    members = operations.members
    made = members.invite(bytes(range(32)), "kitchen-pi", 60.0, 1)
    assert members.invite(bytes(range(32)), "kitchen-pi", 60.0, 1) == made
    assert members.invitations(0, "").items == (made,)
    assert members.revoke_invitation(made.invitation_id).revoked_at is not None
    with pytest.raises(Refused) as caught:
        members.revoke_invitation("nothing")
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "seconds", "uses"),
    [("a b", 60.0, 1), ("a", 0.0, 1), ("a", 1e9, 1), ("a", 60.0, 0), ("a", 60.0, 100_000)],
)
def test_an_invitation_that_cannot_be(
    operations: Operations, name: str, seconds: float, uses: int
) -> None:
    with pytest.raises(ConfigError):
        operations.members.invite(bytes(32), name, seconds, uses)
    assert operations.members.invitations(0, "").items == ()


# watching and taking home


class Serving:
    """A coordinator that executes another run."""

    def state_of(self, run_id: bytes) -> RunState | None:
        return RunState(POLICY, deadline=5.0) if run_id == RUN_ID else None

    def open_run(self) -> bytes | None:
        return RUN_ID

    def connected(self) -> frozenset[str]:
        return frozenset("ab")

    def remove(self, agent_id: str, reason: str) -> None:
        raise AssertionError("nobody is banned here")


def test_a_run_that_is_not_executed_says_which_one_is(
    store: Store, published: Published, tmp_path: Path, plan_folder: PlanFolder
) -> None:
    members = Membership(store.roster, "localhost:7072", b"authority")
    operations = Operations(store, published, members, tmp_path / "spool", False, Serving())
    start(operations, plan_folder)
    start(operations, plan_folder, bytes(16))
    mine, other = (operations.watch(run_id, 10)().open_phase for run_id in (RUN_ID, bytes(16)))
    assert mine is not None
    assert other is not None
    assert (mine.behind, mine.deadline, mine.connected) == (None, 5.0, 2)
    assert (other.behind, other.deadline) == (RUN_ID, None)


def test_privacy_follows_from_the_stored_terms(
    operations: Operations, plan_folder: PlanFolder
) -> None:
    start(operations, plan_folder)
    report = operations.privacy(RUN_ID)
    assert (report.coordinator_reads, report.minimum) == ("every update", 1)
    assert not report.authority_is_offline
    assert report.lines[0][0] == "coordinator"


def plain_sum(published: Published, number: int, mean: np.ndarray) -> RoundRecord:
    """Publish the sum of one update, as a round of weight cap 1 has it."""
    context = crypto.UpdateContext(RUN_ID, number, 1, len(mean), 100, 1, 1.0)
    protection = crypto.protection("plain")
    encoder = protection.encoder(context, 0, None, np.random.default_rng(0))
    total = protection.accumulator(context)
    update = b"".join(encoder.encode(mean.astype(np.float32), 1))
    spool = published.folder / "update"
    spool.write_bytes(update)
    with spool.open("rb") as file:
        total.add(0, file)
    spool.unlink()
    reference = published.put(total.result())
    return RoundRecord(number, 1, 1, (0,), reference, 1.0, clip=1.0)


def exported(model: Model, tmp_path: Path) -> np.ndarray:
    path = tmp_path / ADAPTER_FILE
    (adapter,) = [file for file in model.files if file.name == ADAPTER_FILE]
    path.write_bytes(b"".join(adapter.parts()))
    return read_adapter(path, LAYOUT)


def test_the_model_is_what_the_rounds_make_of_the_plan(
    operations: Operations,
    plan_folder: PlanFolder,
    published: Published,
    store: Store,
    tmp_path: Path,
) -> None:
    start(operations, plan_folder)
    untrained = operations.model(RUN_ID)
    np.testing.assert_array_equal(exported(untrained, tmp_path), plan_folder.theta)
    for number in (1, 2):
        store.add_round(RUN_ID, plain_sum(published, number, np.full(8, 0.5)))
    model = operations.model(RUN_ID)
    assert (untrained.rounds, model.rounds) == (0, 2)
    np.testing.assert_array_equal(exported(model, tmp_path), plan_folder.theta + 1)
    assert model.files[0].name == PLAN_FILE
    whole = b"".join(model.parts())
    assert len(whole) == sum(file.reference.size_bytes for file in model.files)
    for file in model.files:
        assert hashlib.sha256(b"".join(file.parts())).digest() == file.reference.sha256
    for offset in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert b"".join(model.parts(offset)) == whole[offset:]


RELEASED = PLAIN.replace("minimum = 1", "minimum = 3").replace(
    '"plain"', '"sealed"\nrelease = "coordinator"'
)


def test_sums_that_agents_return_make_a_model_up_to_the_first_that_is_missing(
    operations: Operations,
    plan_folder: PlanFolder,
    published: Published,
    store: Store,
    tmp_path: Path,
) -> None:
    assert operations.start_run(RUN_ID, run_file(plan_folder, RELEASED)).problems == ()
    tail = np.full(tail_length(DEFAULT_EVALUATION, plan_folder.plan.task), 0.25)  # not the rule's
    for number, opened in ((1, True), (2, False), (3, True)):
        record = plain_sum(published, number, np.concatenate([np.full(8, 0.5), tail]))
        sealed = published.put(iter([b"nobody here can open this"]))
        store.add_round(RUN_ID, replace(record, sum=sealed, cohort_digest=bytes(32)))
        if opened:
            store.set_opened(RUN_ID, number, record.sum)
    model = operations.model(RUN_ID)
    assert model.rounds == 1
    np.testing.assert_array_equal(exported(model, tmp_path), plan_folder.theta + 0.5)


def test_a_blind_coordinator_exports_nothing(
    operations: Operations, plan_folder: PlanFolder
) -> None:
    blind = RELEASED.replace('"coordinator"', '"agents"')
    assert operations.start_run(RUN_ID, run_file(plan_folder, blind)).problems == ()
    with pytest.raises(ConfigError, match="never could read"):
        operations.model(RUN_ID)


@pytest.mark.parametrize("lost", ["plan", "sum"])
def test_a_model_whose_artifacts_are_lost_is_not_found(
    operations: Operations, plan_folder: PlanFolder, published: Published, store: Store, lost: str
) -> None:
    start(operations, plan_folder)
    record = plain_sum(published, 1, np.full(8, 0.5))
    store.add_round(RUN_ID, record)
    references: dict[str, Callable[[], ArtifactReference]] = {
        "plan": lambda: store.run(RUN_ID).plan,
        "sum": lambda: record.sum,
    }
    published.path(references[lost]().sha256).unlink()
    with pytest.raises(Refused) as caught:
        operations.model(RUN_ID)
    assert caught.value.reason is Reason.NOT_FOUND
