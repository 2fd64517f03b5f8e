"""What an operator can get wrong is a ConfigError that says what was expected."""

import json
import shutil
import subprocess
import sys

import pytest

from coordinator.plans import PlanRequest, build_plan
from fedloom.errors import ConfigError


@pytest.fixture
def build(bert, tmp_path):
    """Try to build with changes to a sound request; the folder `work` must stay empty."""
    work = tmp_path / "work"
    work.mkdir()

    def attempt(**changes):
        arguments = {"model": str(bert), "labels": ("no", "yes"), "max_tokens": 24} | changes
        build_plan(PlanRequest(**arguments), work / "plan", lambda line: None, None)

    yield attempt
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("changes", "where", "expected"),
    [
        ({"labels": ("only",)}, "labels", "2.."),
        ({"labels": ("a", "a")}, "labels", "distinct"),
        ({"labels": ("a", "")}, "labels", "empty"),
        ({"rank": 0}, "rank", "1.."),
        ({"alpha": 0.0}, "alpha", "positive"),
        ({"alpha": float("nan")}, "alpha", "positive"),
        ({"targets": ()}, "targets", "names"),
        ({"targets": ("query", "q_proj")}, "targets", "key.*query.*found q_proj"),
        ({"max_tokens": 1}, "max_tokens", "2.."),
        ({"max_tokens": 49}, "max_tokens", "at most 48 for this model, found 49"),
        ({"name": "n" * 129}, "name", "128"),
        ({"seed": -1}, "seed", "0.."),
        ({"model": ""}, "model", "folder"),
        ({"model": "no/such-model"}, "model", "in the cache or can be reached"),
        ({"model": "json"}, "model", "installed package"),
    ],
)
def test_request(build, changes, where, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        build(**changes)
    assert caught.value.where == where


def test_offline_says_what_to_do(build):
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set: unset it to download, or give"):
        build(model="no/such-model")


def test_folder_without_a_model(build, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        build(model=str(tmp_path))


@pytest.fixture
def broken(bert, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(bert, folder)
    return folder


def test_folder_without_weights(build, broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        build(model=str(broken))


def test_damaged_weights(build, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="safetensors"):
        build(model=str(broken))


def test_pickled_weights_are_not_read(build, broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        build(model=str(broken))


def test_folder_without_a_tokenizer(build, broken):
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"expected tokenizer\.json"):
        build(model=str(broken))


def test_tokenizer_larger_than_the_embedding(build, broken):
    path = broken / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 22 + i for i in range(60)}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="at most 40 tokens"):
        build(model=str(broken))


def test_checkpoint_of_another_architecture(build, broken, tiny_model):
    shutil.copy(tiny_model("distilbert") / "config.json", broken)
    with pytest.raises(ConfigError, match="lacks the weights of distilbert"):
        build(model=str(broken), targets=("q_lin", "v_lin"))


def test_occupied_folder(bert, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    request = PlanRequest(model=str(bert), labels=("no", "yes"))
    with pytest.raises(ConfigError, match="empty folder"):
        build_plan(request, tmp_path, lambda line: None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


def test_importing_the_package_loads_nothing_heavy():
    loaded = python("import sys, coordinator.plans; print(*sys.modules)").split()
    assert not {"torch", "transformers", "peft", "onnx", "onnxruntime"}.intersection(loaded)


def test_missing_extra_is_explained(tmp_path):
    code = """
import sys
from pathlib import Path
sys.modules["onnx"] = None
from coordinator.plans import PlanRequest, build_plan
from fedloom.errors import ConfigError
try:
    build_plan(PlanRequest(model="m", labels=("a", "b")), Path("never"), print)
except ConfigError as error:
    print(error)
"""
    assert 'pip install "fedloom[plan]"' in python(code)
