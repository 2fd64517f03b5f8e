"""`fedloom-agent export` writes the forms of a model on this device, without a coordinator."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.commands.export import add_parser
from edge_agent.engine import Evaluation
from edge_agent.invitations import agreed_terms, forget_invitation, keep_invitation
from edge_agent.model_versions import Candidate, ModelMaker
from fedloom.errors import ConfigError, Refused
from fedloom.plans import PLAN_FILE, TOKENIZER_FILE
from fedloom.quality import DEFAULT_EVALUATION
from fedloom.terms import Encoding, LocalTraining, Protection
from fedloom.v1 import control_pb2
from tests.edge_agent.devices import joined
from tests.edge_agent.toy import Toy

RUN = bytes(range(16))


@pytest.fixture
def home(toy: Toy, tmp_path: Path) -> Path:
    """A device that has made two versions of a model in a run that is over."""
    identity = joined(tmp_path / "home")
    models = ModelMaker(tmp_path / "home" / "models", identity.agent_id, identity.identity_key)
    for number in (2, 3):
        theta = np.random.default_rng(number).standard_normal(len(toy.theta)).astype(np.float32)
        measured = Evaluation(10, 4 + number, 0.5)
        models.add(Candidate(toy.folder, toy.plan, theta, RUN, number, measured))
    run = tmp_path / "home" / "runs" / RUN.hex()
    run.mkdir(parents=True)
    message = control_pb2.Invitation(
        run_id=RUN,
        round=3,
        plan=control_pb2.ArtifactReference(sha256=bytes(32), size_bytes=10),
        training=LocalTraining(epochs=5).to_message(),
        encoding=Encoding(Protection.SEALED).to_message(),
        envelopes=[control_pb2.KeyEnvelope(key_id=7)],
        release=control_pb2.RELEASE_AGENTS,
        minimum=3,
        rounds=4,
        evaluation=DEFAULT_EVALUATION.to_message(),
    )
    keep_invitation(run, message)
    forget_invitation(run)
    return tmp_path / "home"


def export(home: Path, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    parser.add_argument("--json", action="store_true")
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["--home", str(home), *map(str, arguments)])
    return options.command(options)


def version(home: Path, number: int) -> Path:
    return home / "models" / "toy" / str(number)


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
        for folder in (out / "merged", version(home, 2))
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
    model = version(home, 1)
    out = tmp_path / "out"
    assert export(home, "export", "--model", model, "--form", "safetensors", "--out", out) == 0
    assert "Not known where this was exported." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--form", "gguf"), "found 'gguf'"),
        (("--form", "peft"), "expected a plan with LoRA"),
        (("--version", "7"), "of version 7"),
        (("--adapter", "other"), r"expected one of \['toy'\], found other"),
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


def test_files_that_were_not_signed_are_not_exported(home: Path, tmp_path: Path) -> None:
    path = version(home, 2) / TOKENIZER_FILE
    content = path.read_bytes().replace(b"lamp", b"damp")
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(Refused, match=TOKENIZER_FILE):
        export(home, "export", "--out", tmp_path / "out")
    assert export(home, "export", "--version", "1", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / TOKENIZER_FILE).read_bytes() != content
