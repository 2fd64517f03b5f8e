"""`data check`: it says what a run would use, and nothing of what it reads is printed or kept."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.config import CONFIG_FILE, load_agent_config
from edge_agent.data import UnknownLabels
from edge_agent.data_check import add_data_command
from edge_agent.data_options import add_data_options, chosen_sources
from edge_agent.local_data import split_sources
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.scrubbing import Kind
from fedloom.errors import Refused
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.terms import MINIMUM_SUM, Protection, Release
from tests.edge_agent.toy import Toy, toy_rows, write_rows

Check = Callable[..., str]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Write `agent.toml`, run the command, and return what it printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=tmp_path)
    parser.add_argument("--json", action="store_true")
    add_data_command(parser.add_subparsers())

    def run(toml: str, *options: str) -> str:
        (tmp_path / CONFIG_FILE).write_text(toml)
        chosen = parser.parse_args(["data", "check", *options])
        assert chosen.command(chosen) == 0
        return capsys.readouterr().out

    return run


def test_what_is_said_is_what_a_run_uses(toy: Toy, tmp_path: Path, check: Check) -> None:
    rows = [*toy_rows(300, seed=1), ("mail me at a.b@example.org", "music"), ("", "music")]
    write_rows(tmp_path / "d.csv", rows)
    toml = '[data]\npath = "d.csv"\n[split]\nheld_out = 0.2\n[privacy]\nscrub = ["email"]\n'
    said = json.loads(check(toml, "--plan", str(toy.folder), "--json"))
    sources = split_sources(tmp_path, load_agent_config(tmp_path))
    engine = OnnxEngine(toy.folder, toy.plan, *sources, threads=1)
    evaluation = engine.evaluate(toy.theta)
    assert evaluation is not None
    assert said["held_out"]["rows"] == evaluation.count
    assert said["train"]["rows"] + said["held_out"]["rows"] == 301
    assert said["train"]["broken"] == {"a text or label is missing": 1}
    assert (
        said["train"]["scrubbed"].get("email", 0) + said["held_out"]["scrubbed"].get("email", 0)
        == 1
    )
    labels = {label for _, label in rows}
    for label in labels:
        total = said["train"]["labels"][label] + said["held_out"]["labels"][label]
        assert total == sum(1 for text, found in rows if text and found == label)
    assert not (tmp_path / "examples").exists()


@pytest.mark.parametrize("plan", [True, False])
def test_no_row_is_printed_and_the_statement_is_that_of_the_runs(
    toy: Toy, tmp_path: Path, check: Check, plan: bool
) -> None:
    write_rows(tmp_path / "d.csv", [("lamp secret", "lights"), ("song hush", "music")])
    policy = '[policy]\nminimum_protection = "encrypted"\nrelease = "coordinator"\n'
    out = check(f'[data]\npath = "d.csv"\n{policy}', *(["--plan", str(toy.folder)] if plan else []))
    assert "secret" not in out
    assert "hush" not in out
    assert "lights 1, music 1" in out
    terms = PrivacyTerms(Protection.ENCRYPTED, Release.COORDINATOR, MINIMUM_SUM)
    for party, learns in privacy_statement(terms).lines():
        assert f"  {party:24} {learns}\n" in out


def test_a_plan_kept_from_a_run_is_compared_with_the_labels(
    toy: Toy, tmp_path: Path, check: Check
) -> None:
    write_rows(tmp_path / "d.csv", [("lamp", "lights"), ("x", "wether")])
    toml = '[data]\npath = "d.csv"\n'
    assert "wether 1" in check(toml)
    (tmp_path / "plans").mkdir()
    toy.folder.rename(tmp_path / "plans" / "ab")
    with pytest.raises(Refused, match=r"'wether' in row 2 of d\.csv"):
        check(toml)
    assert "1 rows of labels that the plan" in check(f'{toml}unknown_labels = "skip"\n')


def test_without_a_plan_the_columns_tell_what_the_rows_are(tmp_path: Path, check: Check) -> None:
    (tmp_path / "w.jsonl").write_text('{"words": ["a", "b"], "tags": ["O", "B"]}\n')
    assert "O 1, B 1" in check('[data]\npath = "w.jsonl"\n')
    (tmp_path / "w.conll").write_text("a O\nb B\n\nc O\n")
    assert "O 2, B 1" in check('[data]\npath = "w.conll"\n')
    (tmp_path / "q.csv").write_text("q,a\nwhat,that\n")
    assert "greatest 8" in check('[data]\npath = "q.csv"\nprompt = "{q}?"\nanswer = "{a}"\n')
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 3)), label=np.array(["on"] * 5))
    assert "on 5" in check('[data]\npath = "x.npz"\n')
    (tmp_path / "n.csv").write_text("x0,x1,y\n1,2,3\n1,nan,3\n")
    out = check('[data]\npath = "n.csv"\narrays = { x = ["x0..x1"], labels = ["y"] }\n')
    assert "not finite numbers of the plan's shape: 1" in out
    (tmp_path / "t.csv").write_text("utterance,intent\na,b\n")
    with pytest.raises(Refused, match="expected a column 'text'"):
        check('[data]\npath = "t.csv"\n')


def test_what_join_is_told_of_the_data_is_what_the_configuration_says() -> None:
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    line = (
        "--data d.jsonl --text body --column words=tokens --column window=x0..x9,y --prompt Q:{q} "
        "--answer {r} --split 0.1 --unknown-labels skip --scrub email,iban"
    )
    data, held_out, share = chosen_sources(parser.parse_args(line.split()))
    assert (data.path.name, held_out, share) == ("d.jsonl", None, 0.1)
    assert (data.text, data.label, data.words, data.tags) == ("body", "label", "tokens", "tags")
    assert (data.prompt, data.answer) == ("Q:{q}", "{r}")
    assert data.arrays == (("window", ("x0..x9", "y")),)
    assert data.treatment.unknown_labels is UnknownLabels.SKIP
    assert data.treatment.scrub.kinds == (Kind.EMAIL, Kind.IBAN)
