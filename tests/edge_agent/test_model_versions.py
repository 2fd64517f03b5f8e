"""Versions on disk: signed, shared, pruned, rolled back; the gate; and swaps while others ask."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.activation import gate_problem, keep_model
from edge_agent.engine import Evaluation
from edge_agent.library import Library
from edge_agent.model_versions import Active, Candidate, ModelMaker, ModelVersions, adapter_name
from edge_agent.statements import SIGNATURE_FILE, STATEMENT_FILE, Statement
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.gates import OPEN_GATE, ActivationGate
from fedloom.plans import ADAPTER_FILE, BASE_FILE
from fedloom.v1 import control_pb2
from tests.edge_agent.toy import LABELS, PARAMETERS, Toy

KEY = Ed25519PrivateKey.generate()
NAME = "toy"


@pytest.fixture
def maker(tmp_path: Path) -> ModelMaker:
    return ModelMaker(tmp_path / "models", "kitchen-pi", KEY, kept=3)


def favouring(label: int) -> np.ndarray:
    """Return a theta that answers every text with one label."""
    theta = np.zeros(PARAMETERS, np.float32)
    theta[PARAMETERS - len(LABELS) + label] = 5.0
    return theta


def candidate(toy: Toy, round_number: int, run: int = 1, label: int = 0) -> Candidate:
    run_id = bytes([run]) * 16
    return Candidate(toy.folder, toy.plan, favouring(label), run_id, round_number)


def answer(library: Library) -> tuple[int, str]:
    adapter = library.adapter(NAME)
    [prediction] = adapter.model.answer(adapter.theta, ["lamp"])
    return adapter.version, prediction.label


def refuses(library: Library, reason: Reason = Reason.PLAN_MISMATCH) -> str:
    with pytest.raises(Refused) as caught:
        library.adapter(NAME)
    assert caught.value.reason is reason
    return caught.value.subject


def test_versions_share_every_file_but_the_adapter(toy: Toy, maker: ModelMaker) -> None:
    first, second = (maker.add(candidate(toy, n, label=n)) for n in (1, 2))
    assert (first.version, second.version) == (1, 2)
    for name in {p.name for p in maker.path(NAME, 2).iterdir()}:
        shared = os.path.samefile(maker.path(NAME, 1) / name, maker.path(NAME, 2) / name)
        assert shared == (name not in (ADAPTER_FILE, STATEMENT_FILE, SIGNATURE_FILE)), name
    assert os.path.samefile(maker.path(NAME, 2) / BASE_FILE, toy.folder / BASE_FILE)
    assert maker.active(NAME) == Active(2)
    np.testing.assert_array_equal(
        read_adapter(maker.path(NAME, 1) / ADAPTER_FILE, toy.plan.layout), favouring(1)
    )
    assert maker.adapters() == [NAME]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("intent", "intent"), ("../x", "x"), ("", "model"), ("..", "model"), ("a b/c\0", "a-b-c")],
)
def test_a_plans_name_becomes_a_file_name(toy: Toy, name: str, kept: str) -> None:
    assert adapter_name(replace(toy.plan, name=name)) == kept


def test_any_byte_that_changes_is_refused(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1))
    folder = maker.path(NAME, 1)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            changed = bytearray(whole)
            changed[place] ^= 1
            path.unlink()  # the plan's folder has the same file
            path.write_bytes(changed)
            refuses(Library(maker, threads=1))
        path.write_bytes(whole)
    assert answer(Library(maker, threads=1)) == (1, LABELS[0])


def test_another_devices_version_is_refused(toy: Toy, maker: ModelMaker, tmp_path: Path) -> None:
    maker.add(candidate(toy, 1))
    other = ModelVersions(maker.folder, Ed25519PrivateKey.generate().public_key())
    refuses(Library(other, threads=1))
    assert [type(said) for said in other.versions(NAME)] == [Refused]


def test_a_copy_under_another_number_or_name_is_refused(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1))
    maker.add(candidate(toy, 2))
    maker.path(NAME, 1).rename(maker.path(NAME, 9))
    with pytest.raises(Refused, match="signed copy of version 1"):
        maker.activate(NAME, Active(9))
    (maker.folder / NAME).rename(maker.folder / "other")
    with pytest.raises(Refused, match="signed copy of version 2 of toy"):
        Library(maker, threads=1).adapter("other")


def test_the_newest_the_last_of_each_run_and_the_active_are_kept(
    toy: Toy, maker: ModelMaker
) -> None:
    for run, rounds in ((1, 2), (2, 3), (3, 5)):
        for number in range(1, rounds + 1):
            maker.add(candidate(toy, number, run))
    found = {said.version for said in maker.versions(NAME) if isinstance(said, Statement)}
    assert found == {2, 5, 8, 9, 10}  # the last of runs 1 and 2, the newest three
    maker.activate(NAME, Active(2, held=True))
    for number in range(1, 6):
        maker.add(candidate(toy, number, run=4))
        maker.add(candidate(toy, number, run=5))
    assert maker.active(NAME) == Active(2, held=True)
    assert (maker.path(NAME, 2) / ADAPTER_FILE).exists()


def test_a_cut_addition_leaves_no_version(
    toy: Toy, maker: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker.add(candidate(toy, 1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_agent.model_versions.write_statement", full)
    with pytest.raises(OSError, match="No space"):
        maker.add(candidate(toy, 2))
    assert [path.name for path in (maker.folder / NAME).iterdir() if path.is_dir()] == ["1"]
    assert maker.active(NAME) == Active(1)


def test_what_a_kill_left_behind_is_swept_and_a_damaged_pointer_replaced(
    toy: Toy, maker: ModelMaker
) -> None:
    maker.add(candidate(toy, 1))
    (maker.folder / NAME / "..2.0a1b2c3d.9f8e7d6c").mkdir()
    (maker.folder / NAME / ".2.0a1b2c3d").mkdir()
    maker.pointer(NAME).write_bytes(b"")
    with pytest.raises(ConfigError, match="models rollback"):
        Library(maker, threads=1).adapter(NAME)
    maker.add(candidate(toy, 2, label=1))
    assert answer(Library(maker, threads=1)) == (2, LABELS[1])
    assert sorted(p.name for p in (maker.folder / NAME).iterdir()) == ["1", "2", "active"]


def test_a_rollback_holds_until_a_person_follows_again(toy: Toy, maker: ModelMaker) -> None:
    for number in (1, 2):
        maker.add(candidate(toy, number, label=number - 1))
    library = Library(maker, threads=1)
    assert answer(library) == (2, LABELS[1])
    maker.activate(NAME, Active(1, held=True))
    assert answer(library) == (1, LABELS[0])
    maker.add(candidate(toy, 3, label=2))
    assert answer(library) == (1, LABELS[0])
    maker.activate(NAME, Active(maker.usable(NAME)[-1]))
    assert answer(library) == (3, LABELS[2])


def test_a_refused_version_is_listed_and_can_never_answer(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1))
    said = maker.add(replace(candidate(toy, 2), refused="too bad"))
    assert (said.version, said.refused) == (2, "too bad")
    assert maker.active(NAME) == Active(1)
    assert {p.name for p in maker.path(NAME, 2).iterdir()} == {STATEMENT_FILE, SIGNATURE_FILE}
    with pytest.raises(Refused, match="too bad"):
        maker.activate(NAME, Active(2))
    pointer = maker.pointer(NAME)
    pointer.write_text('{"version": 2, "held": false}')  # past the command
    assert "too bad" in refuses(Library(maker, threads=1), Reason.NOT_PERMITTED)
    assert maker.usable(NAME) == [1]


def test_the_session_outlives_every_swap(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1))
    library = Library(maker, threads=1)
    model = library.adapter(NAME).model
    for number in range(2, 8):
        maker.add(candidate(toy, number, label=number % 3))
        assert answer(library) == (number, LABELS[number % 3])
        assert library.adapter(NAME).model is model


def test_adapters_of_one_plan_share_a_session_and_others_do_not(
    toy: Toy, maker: ModelMaker, make_toy
) -> None:
    maker.add(candidate(toy, 1))
    renamed = replace(toy.plan, name="again")
    other = make_toy("other", max_tokens=8)
    maker.add(replace(candidate(toy, 1), plan=renamed))
    (maker.folder / "third").mkdir()
    third = replace(candidate(toy, 1), plan=replace(other.plan, name="third"))
    maker.add(replace(third, plan_folder=other.folder))
    library = Library(maker, threads=1)
    models = [library.adapter(name).model for name in ("toy", "again", "third")]
    assert models[0] is models[1]
    assert models[1] is not models[2]
    assert library.names() == ["again", "third", "toy"]
    with pytest.raises(ConfigError, match="again"):
        library.only_name()


def test_a_damaged_version_leaves_the_one_before_in_use(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1, label=1))
    library = Library(maker, threads=1)
    assert answer(library) == (1, LABELS[1])
    maker.add(candidate(toy, 2, label=2))
    (maker.path(NAME, 2) / SIGNATURE_FILE).write_bytes(bytes(64))
    assert answer(library) == (1, LABELS[1])
    maker.add(candidate(toy, 3, label=0))
    assert answer(library) == (3, LABELS[0])
    maker.pointer(NAME).write_bytes(b"\xff{")
    assert answer(library) == (3, LABELS[0])


@pytest.mark.parametrize("name", ["../toy", "", ".", "toy/1", "nobody", "\0"])
def test_a_name_that_no_adapter_has_is_no_path(toy: Toy, maker: ModelMaker, name: str) -> None:
    maker.add(candidate(toy, 1))
    with pytest.raises(ConfigError):
        Library(maker, threads=1).adapter(name)


def test_who_asks_while_versions_swap_gets_one_version_whole(toy: Toy, maker: ModelMaker) -> None:
    maker.add(candidate(toy, 1, label=1))
    library = Library(maker, threads=1)
    over = threading.Event()
    seen: list[list[int]] = [[] for _ in range(4)]
    wrong: list[str] = []

    def ask(own: list[int]) -> None:
        while not over.is_set():
            version, label = answer(library)
            if label != LABELS[version % 3]:
                wrong.append(f"version {version} answered {label}")
            own.append(version)

    threads = [threading.Thread(target=ask, args=(own,)) for own in seen]
    for thread in threads:
        thread.start()
    for number in range(2, 25):
        maker.add(candidate(toy, number, label=number % 3))
    last = answer(library)
    over.set()
    for thread in threads:
        thread.join()
    assert last == (24, LABELS[0])
    assert wrong == []
    assert all(own == sorted(own) and own for own in seen)  # never back to an older one


class Judge:
    """An engine that only evaluates: the accuracy of a theta is its share of one label's rows."""

    def __init__(self, found: dict[int, Evaluation | None]) -> None:
        self.found = found
        self.asked: list[int] = []

    def evaluate(self, theta: np.ndarray) -> Evaluation | None:
        label = int(theta[-len(LABELS) :].argmax())
        self.asked.append(label)
        return self.found[label]

    def train(self, *_: object) -> None:
        raise NotImplementedError


GOOD, FAIR, BAD = Evaluation(100, 90, 0.3), Evaluation(100, 85, 0.4), Evaluation(100, 40, 1.5)


@pytest.mark.parametrize(
    ("gate", "found", "active", "passes"),
    [
        (OPEN_GATE, None, None, True),
        (ActivationGate(minimum_accuracy=0.85), FAIR, None, True),
        (ActivationGate(minimum_accuracy=0.86), FAIR, None, False),
        (ActivationGate(minimum_accuracy=0.0), None, None, False),
        (ActivationGate(maximum_loss=0.4), FAIR, None, True),
        (ActivationGate(maximum_loss=0.39), FAIR, None, False),
        (ActivationGate(maximum_accuracy_drop=0.05), FAIR, GOOD, True),
        (ActivationGate(maximum_accuracy_drop=0.04), FAIR, GOOD, False),
        (ActivationGate(maximum_accuracy_drop=0.0), GOOD, GOOD, True),
        (ActivationGate(maximum_accuracy_drop=0.0), BAD, None, True),
        (ActivationGate(maximum_loss_rise=0.11), FAIR, GOOD, True),
        (ActivationGate(maximum_loss_rise=0.09), FAIR, GOOD, False),
        (ActivationGate(maximum_loss_rise=0.0), Evaluation(1, 1, float("nan")), GOOD, False),
        (ActivationGate(maximum_loss=1.0), Evaluation(1, 1, float("nan")), None, False),
        (ActivationGate(minimum_accuracy=0.5, maximum_loss=0.1), GOOD, None, False),
    ],
)
def test_the_gate_lets_through_what_reaches_every_bound(
    gate: ActivationGate, found: Evaluation | None, active: Evaluation | None, passes: bool
) -> None:
    assert (gate_problem(gate, found, active) == "") == passes
    assert ActivationGate.from_message(gate.to_message() or control_pb2.ActivationGate()) == gate


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
def test_bounds_out_of_range_are_refused(bad: float) -> None:
    for name in ("minimum_accuracy", "maximum_accuracy_drop"):
        with pytest.raises(Refused, match=name):
            ActivationGate(**{name: bad})


def test_a_bad_round_is_never_activated(toy: Toy, maker: ModelMaker) -> None:
    judge = Judge({0: GOOD, 1: BAD, 2: FAIR})
    gate = ActivationGate(minimum_accuracy=0.5, maximum_accuracy_drop=0.04)
    said = [keep_model(maker, judge, gate, candidate(toy, n, label=n - 1)) for n in (1, 2, 3)]
    assert [bool(one.refused) for one in said] == [False, True, True]
    assert maker.active(NAME) == Active(1)
    assert "found 40.00%" in said[1].refused
    assert "90.00% of the model in use" in said[2].refused
    assert [one.evaluation for one in said] == [GOOD, BAD, FAIR]


def test_the_model_in_use_is_measured_anew_unless_its_plan_was_another(
    toy: Toy, maker: ModelMaker, make_toy
) -> None:
    gate = ActivationGate(maximum_accuracy_drop=0.0)
    keep_model(maker, Judge({0: FAIR}), gate, candidate(toy, 1))
    judge = Judge({0: BAD, 1: BAD})  # held-out data have become harder since
    assert not keep_model(maker, judge, gate, candidate(toy, 2, label=1)).refused
    assert judge.asked == [1, 0]
    other = make_toy("other", max_tokens=8)
    keep_model(maker, Judge({0: GOOD, 1: FAIR}), gate, candidate(toy, 3))
    judge = Judge({2: FAIR})
    said = keep_model(maker, judge, gate, candidate(other, 1, run=2, label=2))
    assert "90.00% of the model in use" in said.refused  # what was measured when it was made
    assert judge.asked == [2]


def test_a_round_is_kept_once(toy: Toy, maker: ModelMaker) -> None:
    judge = Judge({0: GOOD})
    first, again = (keep_model(maker, judge, OPEN_GATE, candidate(toy, 1)) for _ in range(2))
    assert first == again
    assert judge.asked == []  # an open gate needs no measurement
    assert len(maker.versions(NAME)) == 1


def test_what_cannot_be_measured_does_not_pass(toy: Toy, maker: ModelMaker) -> None:
    said = keep_model(maker, Judge({0: None}), ActivationGate(maximum_loss=9.0), candidate(toy, 1))
    assert "held_out" in said.refused
    assert maker.active(NAME) is None
    assert maker.usable(NAME) == []
