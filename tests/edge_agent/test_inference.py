"""Export and answers: what is exported answers as the engine evaluates, and stands on its own."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edge_agent.data import DataSource
from edge_agent.inference import Prediction, load_exported
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.row_readers import classified_texts
from fedloom.adapters import read_adapter, write_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.exports import export_model
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, PLAN_FILE, load_plan
from fedloom.terms import LocalTraining
from tests.edge_agent.toy import Unkept


def classify(folder: Path, texts: list[str]) -> list[Prediction]:
    adapter = load_exported(folder)
    return adapter.model.answer(adapter.theta, texts)


@pytest.fixture
def trained(toy, train_data: DataSource) -> np.ndarray:
    engine = OnnxEngine(toy.folder, toy.plan, train_data, None, threads=1)
    terms = LocalTraining(epochs=6, learning_rate=0.05)
    return toy.theta + engine.train(toy.theta, terms, 0, lambda _: None, Unkept()).delta


@pytest.fixture
def exported(toy, trained: np.ndarray, tmp_path: Path) -> Path:
    out = tmp_path / "models" / "toy"
    export_model(toy.folder, toy.plan, trained, out)
    return out


def test_the_exported_model_answers_as_the_engine_evaluates(
    toy, trained: np.ndarray, exported: Path, held_out: DataSource
) -> None:
    rows = list(classified_texts(held_out, toy.plan.task.labels))
    evaluation = OnnxEngine(toy.folder, toy.plan, held_out, held_out).evaluate(trained)
    predictions = classify(exported, [row.text for row in rows])
    expected = [toy.plan.task.labels[row.label] for row in rows]
    right = [p.label == label for p, label in zip(predictions, expected, strict=True)]
    assert evaluation is not None
    assert sum(right) == evaluation.correct
    assert sum(right) > 90
    loss = np.mean([-np.log(p.probability) for p, ok in zip(predictions, right, strict=True) if ok])
    assert loss <= evaluation.mean_loss


def test_the_exported_graph_needs_no_theta_from_its_user(exported: Path, toy) -> None:
    """Any ONNX Runtime, in any language: the default of theta is the exported adapter."""
    session = ort.InferenceSession(str(exported / INFER_GRAPH), providers=["CPUExecutionProvider"])
    tokens = {"input_ids": np.array([[2, 4, 5, 3]]), "attention_mask": np.ones((1, 4), np.int64)}
    (logits,) = session.run(None, tokens)
    probabilities = np.exp(logits[0]) / np.exp(logits[0]).sum()
    (prediction,) = classify(exported, ["lamp bright"])
    assert prediction.label == toy.plan.task.labels[int(probabilities.argmax())] == "lights"
    assert prediction.probability == pytest.approx(probabilities.max(), rel=1e-5)


def test_answers_come_in_the_order_of_the_texts_whatever_their_length(exported: Path) -> None:
    texts = ["rain in the room now please", "lamp", "song for me please", "", "unheard-of words"]
    together = classify(exported, texts)
    assert [p.label for p in together[:3]] == ["weather", "lights", "music"]
    for text, prediction in zip(texts, together, strict=True):
        (alone,) = classify(exported, [text])
        assert alone.label == prediction.label
        assert alone.probability == pytest.approx(prediction.probability, rel=1e-5)
        assert 1 / 3 - 1e-6 <= alone.probability <= 1
    assert classify(exported, []) == []
    assert isinstance(together[0], Prediction)


def test_an_export_holds_what_inference_needs_and_shares_the_weights(toy, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert TRAIN_GRAPH not in names
    assert names == {
        INFER_GRAPH,
        BASE_FILE,
        ADAPTER_FILE,
        PLAN_FILE,
        "adapter_config.json",
        "tokenizer.json",
    }
    assert os.path.samefile(exported / BASE_FILE, toy.folder / BASE_FILE)
    assert load_plan(exported) == toy.plan
    np.testing.assert_array_equal(
        read_adapter(toy.folder / ADAPTER_FILE, toy.plan.layout), toy.theta
    )


def test_a_new_export_replaces_the_old_one(toy, exported: Path) -> None:
    export_model(toy.folder, toy.plan, toy.theta, exported)
    np.testing.assert_array_equal(read_adapter(exported / ADAPTER_FILE, toy.plan.layout), toy.theta)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_without_hard_links_the_files_are_copied(
    toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    export_model(toy.folder, toy.plan, toy.theta, tmp_path / "copy")
    assert not os.path.samefile(tmp_path / "copy" / BASE_FILE, toy.folder / BASE_FILE)
    assert classify(tmp_path / "copy", ["lamp"])


def test_a_persons_files_are_never_replaced(toy, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "photos", tmp_path / "file", toy.folder):
        with pytest.raises(ConfigError, match="expected a new folder or an exported model"):
            export_model(toy.folder, toy.plan, toy.theta, target)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    assert (toy.folder / TRAIN_GRAPH).exists()


def test_a_failed_export_leaves_the_old_one_and_no_rest(toy, exported: Path) -> None:
    before = (exported / ADAPTER_FILE).read_bytes()
    (toy.folder / INFER_GRAPH).unlink()
    with pytest.raises(Refused) as caught:
        export_model(toy.folder, toy.plan, toy.theta, exported)
    assert caught.value.reason is Reason.PLAN_MISMATCH
    assert (exported / ADAPTER_FILE).read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_values_that_are_not_finite_are_not_exported(toy, tmp_path: Path) -> None:
    theta = toy.theta.copy()
    theta[3] = np.nan
    with pytest.raises(Refused) as caught:
        export_model(toy.folder, toy.plan, theta, tmp_path / "out")
    assert caught.value.reason is Reason.NOT_FINITE
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_plan_is_refused(toy, exported: Path) -> None:
    layout = toy.plan.layout[:1]
    write_adapter(exported / ADAPTER_FILE, layout, np.zeros(layout[0].size, np.float32))
    with pytest.raises(Refused) as caught:
        load_exported(exported)
    assert caught.value.reason is Reason.MALFORMED


def test_a_folder_without_an_adapter_is_refused(exported: Path) -> None:
    (exported / ADAPTER_FILE).unlink()
    with pytest.raises(Refused) as caught:
        load_exported(exported)
    assert caught.value.reason is Reason.PLAN_MISMATCH


def test_a_graph_with_another_contract_is_refused(
    make_toy: Callable[..., object], tmp_path: Path
) -> None:
    toy = make_toy(infer_edit=("(float[B,3] logits)", "(float[B,32] mean)"))
    export_model(toy.folder, toy.plan, toy.theta, tmp_path / "out")
    with pytest.raises(Refused) as caught:
        load_exported(tmp_path / "out")
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
