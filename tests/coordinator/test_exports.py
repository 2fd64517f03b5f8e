"""An exported model is whole, new in one step, and never at the cost of a person's files."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.export_forms import Form, TrainedModel, export_forms, read_forms
from fedloom.exports import export_model
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.model_cards import describe
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    load_plan,
)
from tests.coordinator.samples import LAYOUT, PlanFolder

FILES = {INFER_GRAPH, BASE_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE, PLAN_FILE, ADAPTER_FILE}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_is_the_plan_with_the_trained_adapter(
    tmp_path: Path, plan_folder: PlanFolder
) -> None:
    before = content(plan_folder.folder)
    trained = plan_folder.theta + 1
    out = tmp_path / "models" / "intent"
    export_model(plan_folder.folder, plan_folder.plan, trained, out)
    after = content(out)
    assert set(after) == FILES
    np.testing.assert_array_equal(read_adapter(out / ADAPTER_FILE, LAYOUT), trained)
    assert load_plan(out) == plan_folder.plan
    del after[ADAPTER_FILE]
    assert after.items() <= before.items()
    assert content(plan_folder.folder) == before
    assert [path.name for path in out.parent.iterdir()] == ["intent"]


def test_an_older_export_is_replaced_and_its_links_are_untouched(
    tmp_path: Path, plan_folder: PlanFolder
) -> None:
    out = tmp_path / "model"
    for step in (1, 2):
        export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta + step, out)
    adapter = read_adapter(out / ADAPTER_FILE, LAYOUT)
    np.testing.assert_array_equal(adapter, plan_folder.theta + 2)
    initial = read_adapter(plan_folder.folder / ADAPTER_FILE, LAYOUT)
    np.testing.assert_array_equal(initial, plan_folder.theta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plan"]


@pytest.mark.parametrize("foreign", ["thesis.tex", ".git", "model.onnx"])
def test_a_folder_of_someones_files_is_not_replaced(
    tmp_path: Path, plan_folder: PlanFolder, foreign: str
) -> None:
    out = tmp_path / "out"
    export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta, out)
    (out / foreign).write_bytes(b"years of work")
    before = content(out)
    with pytest.raises(ConfigError, match=foreign):
        export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta + 1, out)
    assert content(out) == before


@pytest.mark.parametrize(
    "foreign", ["README.md", "merged/thesis.tex", "peft/README.md", "models/infer.onnx", "peft"]
)
def test_what_only_looks_like_an_export_is_not_replaced(
    tmp_path: Path, plan_folder: PlanFolder, foreign: str
) -> None:
    out = tmp_path / "out"
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_bytes(b"years of work")
    with pytest.raises(ConfigError, match="expected a new folder or an exported model"):
        export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta, out)
    assert (out / foreign).read_bytes() == b"years of work"


def test_an_export_in_several_forms_is_replaced_by_one_in_others(
    tmp_path: Path, plan_folder: PlanFolder
) -> None:
    model = TrainedModel(
        plan_folder.folder,
        plan_folder.plan,
        plan_folder.theta,
        describe(plan_folder.plan, None, "fedloom"),
    )
    out = tmp_path / "out"
    both = export_forms(model, (Form.ONNX, Form.SAFETENSORS), out)
    assert both.files.keys() == {
        *FILES,
        "labels.json",
        "README.md",
        "safetensors/tokenizer.json",
        "safetensors/trained.safetensors",
    }
    for name, size in both.files.items():
        assert (out / name).stat().st_size == size
        digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
        row = f"| {name.replace('_', chr(92) + '_')} | {size} | {digest} |"
        assert name == "README.md" or row in (out / "README.md").read_text()
    export_forms(model, (Form.SAFETENSORS,), out)
    assert {path.name for path in out.iterdir()} == {"README.md", "safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan"]


def test_forms_are_read_from_repeated_and_joined_options() -> None:
    assert read_forms(()) == (Form.ONNX,)
    assert read_forms(("peft, merged", "onnx")) == (Form.ONNX, Form.MERGED, Form.PEFT)
    with pytest.raises(ConfigError, match=r"merged-int8, peft, safetensors, found 'gguf'"):
        read_forms(("peft,gguf",))


def test_a_file_is_not_replaced(tmp_path: Path, plan_folder: PlanFolder) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"years of work")
    with pytest.raises(ConfigError, match="found a file"):
        export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta, out)
    assert out.read_bytes() == b"years of work"


@pytest.mark.parametrize(
    "theta",
    [
        np.array([1, 2, 3, 4, 5, 6, 7, np.nan], np.float32),
        np.array([1, 2, 3, 4, 5, 6, 7, np.inf], np.float32),
        np.zeros(7, np.float32),
        np.zeros((8, 1), np.float32),
    ],
    ids=["NaN", "infinity", "too few", "another shape"],
)
def test_values_that_are_none_are_not_exported(
    tmp_path: Path, plan_folder: PlanFolder, theta: np.ndarray
) -> None:
    with pytest.raises(Refused) as caught:
        export_model(plan_folder.folder, plan_folder.plan, theta, tmp_path / "out")
    assert caught.value.reason is Reason.NOT_FINITE
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_keeps_the_older_one(tmp_path: Path, plan_folder: PlanFolder) -> None:
    out = tmp_path / "out"
    export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta, out)
    before = content(out)
    (plan_folder.folder / TOKENIZER_FILE).unlink()
    with pytest.raises(Refused) as caught:
        export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta + 1, out)
    assert caught.value.reason is Reason.PLAN_MISMATCH
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan"]


def test_a_file_system_without_hard_links_gets_copies(
    tmp_path: Path, plan_folder: PlanFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    export_model(plan_folder.folder, plan_folder.plan, plan_folder.theta, tmp_path / "out")
    assert set(content(tmp_path / "out")) == FILES
    assert (tmp_path / "out" / BASE_FILE).stat().st_nlink == 1
