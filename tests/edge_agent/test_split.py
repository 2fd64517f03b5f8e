"""The split by content: stable under whatever happens to the files, and the agent's own."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.config import AgentConfig
from edge_agent.data import DataSource, Treatment
from edge_agent.examples import read_examples, read_held_out
from edge_agent.local_data import data_reports, on_this_device, split_sources
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.row_readers import classified_texts
from edge_agent.scrubbing import Kind, Scrub
from fedloom.errors import ConfigError, Refused
from tests.edge_agent.toy import LABELS, Toy, toy_rows, write_rows

Rows = list[tuple[str, str]]


def sides(home: Path, data: DataSource, share: float = 0.25) -> tuple[set[str], set[str]]:
    """Return the texts of both sides, as an agent that was just started reads them."""
    train, held_out = split_sources(home, AgentConfig(data, held_out_share=share))
    assert held_out is not None
    found: list[set[str]] = []
    for source in (train, held_out):
        found.append(set())
        with contextlib.suppress(Refused):  # a side that is empty
            found[-1].update(row.text for row in classified_texts(source, LABELS))
    return found[0], found[1]


@given(st.permutations(range(40)), st.integers(1, 39))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_keep_their_side_when_others_are_appended_moved_or_relabelled(
    tmp_path: Path, order: list[int], first: int
) -> None:
    rows = [(f"text {i}", LABELS[0]) for i in range(40)]
    train, held_out = sides(tmp_path, write_rows(tmp_path / "all.csv", rows))
    assert train | held_out == {text for text, _ in rows}
    assert not train & held_out
    some = [(rows[i][0], LABELS[1]) for i in order[:first]]
    lines = [json.dumps({"text": text, "label": label}) for text, label in some]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    texts = {text for text, _ in some}
    assert sides(tmp_path, DataSource(tmp_path / "some.jsonl")) == (train & texts, held_out & texts)


def test_equal_texts_share_a_side(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.csv", [(f"text {i % 50}", LABELS[i % 3]) for i in range(500)])
    train, held_out = sides(tmp_path, data)
    assert not train & held_out


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_what_was_asked_for_and_agents_differ(tmp_path: Path, share: float) -> None:
    data = write_rows(tmp_path / "d.csv", [(f"text {i}", LABELS[0]) for i in range(2000)])
    drawn = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        drawn.append(sides(tmp_path / name, data, share)[1])
        deviation = (2000 * share * (1 - share)) ** 0.5
        assert abs(len(drawn[-1]) - 2000 * share) < 6 * deviation  # fails once in 10^9 runs
    assert drawn[0] != drawn[1]
    assert (tmp_path / "one" / "split.salt").stat().st_mode & 0o777 == 0o600


def test_both_sides_are_kept_and_reported(toy: Toy, tmp_path: Path) -> None:
    rows = [*toy_rows(200, seed=1), ("", "music")]
    config = AgentConfig(write_rows(tmp_path / "d.csv", rows), held_out_share=0.2)
    ready = on_this_device(tmp_path, config)
    train, broken = read_examples(toy.folder, toy.plan, ready.data)
    held_out, broken_held_out = read_held_out(toy.folder, toy.plan, ready.held_out)
    assert held_out is not None
    assert (broken, broken_held_out) == (1, 0)
    assert len(train) + len(held_out) == 200
    reports = data_reports(tmp_path)
    assert reports["train"]["rows"] == reports["held_out"]["elsewhere"] == len(train)
    engine = OnnxEngine(toy.folder, toy.plan, ready.data, ready.held_out, threads=1)
    evaluation = engine.evaluate(toy.theta)
    assert evaluation is not None
    assert evaluation.count == len(held_out)
    on_this_device(tmp_path, replace(config, held_out_share=0.0))
    assert set(data_reports(tmp_path)) == {"train"}


def test_a_side_that_nothing_was_drawn_for_is_no_evaluation(toy: Toy, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.csv", [("lamp", "lights")] * 50)
    share = 1e-9
    train, held_out = split_sources(tmp_path, AgentConfig(data, held_out_share=share))
    engine = OnnxEngine(toy.folder, toy.plan, train, held_out, threads=1)
    assert engine.evaluate(np.zeros_like(toy.theta)) is None


def test_a_device_that_cannot_scrub_as_its_owner_says_does_not_begin(tmp_path: Path) -> None:
    data = replace(DataSource(tmp_path / "d.csv"), treatment=Treatment(scrub=Scrub((Kind.NAMES,))))
    with pytest.raises(ConfigError, match="names_model"):
        on_this_device(tmp_path, AgentConfig(data))
