"""`fedloom-agent export` writes the forms of a model on this device, without a coordinator."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.commands.export import ChosenModel, add_parser
from edge_agent.engine import Evaluation
from edge_agent.invitations import agreed_terms, forget_invitation, keep_invitation
from fedloom.errors import ConfigError, Refused
from fedloom.exports import export_model
from fedloom.plans import PLAN_FILE
from fedloom.terms import Encoding, LocalTraining, Protection
from fedloom.v1 import artifact_pb2, control_pb2
from tests.edge_agent.toy import Toy

RUN = bytes(range(16))


@pytest.fixture
def home(toy: Toy, tmp_path: Path) -> Path:
    """A device that has made one model in a run that is over."""
    home = tmp_path / "home"
    theta = np.random.default_rng(1).standard_normal(len(toy.theta)).astype(np.float32)
    export_model(toy.folder, toy.plan, theta, home / "models" / RUN.hex())
    run = home / "runs" / RUN.hex()
    run.mkdir(parents=True)
    message = control_pb2.Invitation(
        run_id=RUN,
        round=3,
        plan=artifact_pb2.ArtifactReference(sha256=bytes(32), size_bytes=10),
        training=LocalTraining(epochs=5).to_message(),
        encoding=Encoding(Protection.SEALED).to_message(),
        envelopes=[control_pb2.KeyEnvelope(key_id=7)],
        release=control_pb2.RELEASE_AGENTS,
        minimum=3,
        rounds=4,
    )
    keep_invitation(run, message)
    forget_invitation(run)
    return home


def newest(options: argparse.Namespace) -> ChosenModel:
    return ChosenModel(options.home / "models" / RUN.hex(), RUN.hex(), 3, Evaluation(10, 7, 0.5))


def export(home: Path, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    parser.add_argument("--json", action="store_true")
    add_parser(parser.add_subparsers(), newest)
    options = parser.parse_args(["--home", str(home), *map(str, arguments)])
    return options.command(options)


def test_the_merged_form_answers_as_the_model_does(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(home, "--json", "export", "--form", "onnx,merged", "--out", out) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["compared"]["merged"].startswith("relative error")
    assert said["files"].keys() == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    }
    ids = np.array([[2, 5, 9, 3], [2, 4, 3, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    found, expected = (
        onnxruntime.InferenceSession(folder / "infer.onnx").run(None, feeds)[0]
        for folder in (out / "merged", home / "models" / RUN.hex())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    card = (out / "README.md").read_text()
    assert "| epochs | 5 |" in card
    assert "| protection | sealed |" in card
    assert "| rounds | 3 of 4 |" in card
    assert "| 3 | not known | not known | 0.7000 | 0.5000 | 10 |" in card


def test_what_was_agreed_outlives_the_run_and_its_keys_do_not(home: Path) -> None:
    run = home / "runs" / RUN.hex()
    terms = agreed_terms(run)
    assert terms is not None
    assert (terms.training.epochs, terms.minimum, terms.rounds) == (5, 3, 4)
    (kept,) = run.iterdir()
    assert not control_pb2.Invitation.FromString(kept.read_bytes()).envelopes


def test_a_folder_of_an_unknown_run_is_exported_all_the_same(home: Path, tmp_path: Path) -> None:
    model = home / "models" / RUN.hex()
    out = tmp_path / "out"
    assert export(home, "export", "--model", model, "--form", "safetensors", "--out", out) == 0
    assert "Not known where this was exported." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--form", "gguf"), "found 'gguf'"),
        (("--form", "peft"), "expected a plan with LoRA"),
        (("--model", "nowhere"), f"expected {PLAN_FILE} in the plan folder"),
    ],
)
def test_what_cannot_be_exported_is_said(
    home: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises((ConfigError, Refused), match=problem):
        export(home, "export", "--out", out, *arguments)
    assert not out.exists()
