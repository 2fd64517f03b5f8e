"""What is torch's alone: graphs that it cannot do, where values live, bfloat16, working ahead."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_agent.data import DataSource
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import EVAL_GRAPH
from fedloom.terms import LocalTraining
from tests.edge_agent.toy import EVAL_TEXT, Toy, Unkept, save_toy
from tests.engines.toys import TASK_TOYS

TERMS = LocalTraining(epochs=2, batch_size=16, learning_rate=0.05)
LOGITS = "logits = Gemm<transB = 1>(mean, weight, bias)"


def train(toy: Toy, data: DataSource, **options: object) -> np.ndarray:
    from edge_agent.torch_engine import TorchEngine

    engine = TorchEngine(toy.folder, toy.plan, data, None, threads=1, device="cpu", **options)
    return engine.train(toy.theta, TERMS, 5, lambda share: None, Unkept()).delta


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return save_toy(tmp_path / "plan")


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str, str], Toy]:
    def make(old: str, new: str) -> Toy:
        assert old in EVAL_TEXT
        return save_toy(tmp_path / "edited", eval_text=EVAL_TEXT.replace(old, new))

    return make


@pytest.mark.parametrize(
    ("new", "named"),
    [
        ("found = Det(logits_)\n", "Det"),
        ("found = com.example.Magic(logits_)\n", "Magic"),
        ("found = Softmax<axis = 1, mood = 2>(logits_)\n", "mood"),
        ("found = Add(logits_, nowhere)\n", "nothing gives"),
    ],
    ids=["operator", "domain", "attribute", "value"],
)
def test_a_graph_beyond_the_operators_is_refused_by_name(
    edited: Callable[[str, str], Toy], train_data: DataSource, new: str, named: str
) -> None:
    text = f"logits_ = Gemm<transB = 1>(mean, weight, bias)\n{new} logits = Identity(logits_)"
    with pytest.raises(Refused, match=named) as caught:
        train(edited(LOGITS, text), train_data)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../secret"),
        ("location", "/etc/passwd"),
        ("location", ""),
        ("offset", "-4"),
        ("offset", str(2**40)),
        ("length", "8"),
        ("length", "many"),
    ],
)
def test_weights_come_from_members_of_the_plan_alone(
    toy: Toy, train_data: DataSource, key: str, value: str
) -> None:
    path = toy.folder / EVAL_GRAPH
    model = onnx.load_model(path, load_external_data=False)
    (entry,) = [e for e in model.graph.initializer[0].external_data if e.key == key]
    entry.value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Refused) as caught:
        train(toy, train_data)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    assert str(toy.folder) not in caught.value.subject


@pytest.mark.parametrize("opset", [12, 22])
def test_a_graph_of_another_opset_is_refused(toy: Toy, train_data: DataSource, opset: int) -> None:
    path = toy.folder / EVAL_GRAPH
    model = onnx.load_model(path, load_external_data=False)
    model.opset_import[0].version = opset
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Refused, match=f"opset 13 to 21, found {opset}"):
        train(toy, train_data)


def test_a_loss_that_theta_cannot_move_is_refused(
    edited: Callable[[str, str], Toy], train_data: DataSource
) -> None:
    whole = "found = Gemm<transB = 1>(mean, weight, bias)\n whole = Cast<to = 7>(found)\n"
    with pytest.raises(Refused, match="no value changed"):
        train(edited(LOGITS, f"{whole} logits = Cast<to = 1>(whole)"), train_data)


def test_working_ahead_changes_no_bit(
    toy: Toy, train_data: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_agent import torch_engine

    expected = train(toy, train_data, micro_batch=5)
    monkeypatch.setattr(torch_engine, "works_ahead", lambda device: True)
    np.testing.assert_array_equal(train(toy, train_data, micro_batch=5), expected)


def test_bfloat16_learns_nearly_the_same(toy: Toy, train_data: DataSource) -> None:
    expected, found = train(toy, train_data), train(toy, train_data, bfloat16=True)
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-6 < difference < 0.05


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    from edge_agent.torch_engine import find_device

    with pytest.raises(LookupError, match="'cpu'"):
        find_device("abacus")


@pytest.mark.parametrize("name", TASK_TOYS)
def test_on_an_accelerator_no_operation_mixes_its_values_with_the_cpus(
    name: str, tmp_path: Path
) -> None:
    from tests.engines.one_device import gradient_shape

    made = TASK_TOYS[name](tmp_path / "plan")
    rows = np.arange(4)
    feeds = {
        **made.examples.inputs(rows),
        "labels": made.examples.labels(rows),
        "sample_weight": np.ones(4, np.float32),
        "theta": made.toy.theta,
    }
    assert gradient_shape(made.toy.folder, made.toy.plan, feeds) == made.toy.theta.shape


def test_a_graph_for_other_members_is_refused(toy: Toy, train_data: DataSource) -> None:
    members = tuple(entry for entry in toy.plan.members if entry.name != "base.safetensors")
    with pytest.raises(Refused, match=r"members of its plan, found 'base\.safetensors'"):
        train(replace(toy, plan=replace(toy.plan, members=members)), train_data)
