"""The headline comparison on a toy plan: all of it, from rows to the table."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plans import PlanRequest
from edge_agent.local_rules import Outgoing
from examples.headline import __main__ as command
from examples.headline.cases import CASES, Case
from examples.headline.comparison import CENTRALISED, FEDERATED, LOCAL, Compared, compare
from examples.headline.grids import GRIDS, Grid, Gridded, Row, grid_table
from examples.headline.results import Result
from examples.headline.rows import (
    Dealt,
    by_column,
    by_dirichlet,
    evenly,
    held_back,
    joined,
    shortened,
)
from examples.headline.scores import Judge, Measure, f1_percent
from examples.headline.table import table, verdict
from examples.headline.training import Trainer, mean
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE, Role, TrainableTensor
from fedloom.terms import LocalTraining, LoraRule, Strategy
from tests.edge_agent.toy import save_toy, toy_rows
from tests.edge_agent.toy_tasks import save_tagger


def deal(folder: Path) -> Dealt:
    del folder
    rows = [{"text": text, "label": label} for text, label in toy_rows(240, 1)]
    test = [{"text": text, "label": label} for text, label in toy_rows(120, 2)]
    return Dealt(by_column(rows, "label"), test)


TERMS = LocalTraining(learning_rate=0.05, local_steps=5)
TOY = Case(
    name="toy",
    title="a label for each of 3 agents",
    data="toy.csv",
    measure=Measure.ACCURACY,
    deal=deal,
    request=lambda models, dealt: PlanRequest("toy", ("a", "b")),
    terms=TERMS,
    rounds=8,
    apart=replace(TERMS, local_steps=80),
    others={"FedProx": replace(TERMS, strategy=Strategy.FED_PROX, proximal_mu=0.1)},
    target=60.0,
)


def run_toy(out: Path, case: Case = TOY) -> Compared:
    def build(request: PlanRequest, folder: Path, report: object, cache: object) -> object:
        return save_toy(folder).plan

    return compare(case, out, out, out, lambda line: None, build)


def test_a_federation_learns_what_no_agent_could_alone(tmp_path: Path) -> None:
    found = run_toy(tmp_path)
    scores = {name: result.score for name, result in found.results.items()}
    assert set(scores) == {FEDERATED, "FedProx", CENTRALISED, LOCAL}
    assert scores[CENTRALISED] > 90
    assert scores[LOCAL] < 50  # each has seen one label of three
    assert scores[FEDERATED] > scores[LOCAL] + 10
    assert len(found.results[FEDERATED].scores) == TOY.rounds
    assert f"| toy | {TOY.title} | 240 | accuracy % |" in table([found])


def test_results_are_kept_until_the_settings_change(tmp_path: Path) -> None:
    first = run_toy(tmp_path)
    assert run_toy(tmp_path).results == first.results  # seconds too: nothing ran again
    changed = run_toy(tmp_path, replace(TOY, rounds=2))
    assert len(changed.results[FEDERATED].scores) == 2
    assert changed.results[CENTRALISED] == first.results[CENTRALISED]


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from examples.headline.plots import draw, draw_grids

    draw([run_toy(tmp_path, replace(TOY, rounds=2))], tmp_path / "plot.png")
    grids = [
        replace(GRID, name=f"every-{every}", terms={"fedit": TERMS}, rounds=2, score_every=every)
        for every in (1, 2)
    ]
    done = [Gridded(grid, [run_toy(tmp_path, grid.case(0))]) for grid in grids]
    draw_grids(done, tmp_path / "grids.png")
    for name in ("plot.png", "grids.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_cases_without_their_data_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr("sys.argv", ["headline", "--data-root", nowhere, "--out", str(tmp_path)])
    assert command.main() == 0
    said = capsys.readouterr().err
    assert all(f"{one.name}: skipped" in said for one in (*CASES, *GRIDS))


@given(
    labels=st.lists(st.integers(0, 4), max_size=60),
    agents=st.integers(1, 5),
    alpha=st.sampled_from([0.1, 0.5, 100.0]),
)
@settings(max_examples=40)
def test_every_row_is_dealt_once(labels: list[int], agents: int, alpha: float) -> None:
    rows = [{"row": number, "label": label} for number, label in enumerate(labels)]
    for dealt in (by_dirichlet(rows, labels, agents, alpha), evenly(rows, agents)):
        assert len(dealt) == agents
        assert Counter(row["row"] for row in joined(dealt)) == Counter(range(len(rows)))


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4), most=st.sampled_from([0, 7, 200])
)
@settings(max_examples=40)
def test_rows_to_choose_by_are_in_no_training_and_not_the_tests(
    sizes: list[int], most: int
) -> None:
    numbers = iter(range(sum(sizes)))
    agents = tuple([{"row": next(numbers)} for _ in range(size)] for size in sizes)
    dealt = Dealt(agents, [{"row": -1}])
    choosing = held_back(dealt, most)
    trained = {row["row"] for row in joined(choosing.agents)}
    held = {row["row"] for row in joined([choosing.test])}
    assert not trained & held
    assert held <= set(range(sum(sizes)))
    final = {row["row"] for row in joined(shortened(dealt, most, 0).agents)}
    assert trained <= final
    if most == 7 and min(sizes) >= 10:
        assert trained == final  # there are rows enough: settings are chosen for these very rows


GRID = Grid(
    name="toy-grid",
    title="a label for each of 3 agents",
    data="toy.csv",
    measure=Measure.ACCURACY,
    deal=lambda folder, seed: deal(folder),
    request=TOY.request,
    terms={
        rule: replace(TERMS, lora=LoraRule[rule.upper()]) for rule in ("fedit", "rolora", "fedsa")
    },
    rounds=8,
    score_every=4,
    most_rows=0,
    test_rows=0,
    apart=TOY.apart,
    seeds=2,
)


def test_a_grid_trains_by_every_rule_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_factors = (
        TrainableTensor("lora_A", (2, 24), 0, Role.LORA_A),
        TrainableTensor("lora_B", (24, 2), 48, Role.LORA_B),
        TrainableTensor("bias", (3,), 96, Role.HEAD),
    )
    monkeypatch.setattr("tests.edge_agent.toy.LAYOUT", as_factors)
    done = Gridded(GRID, [run_toy(tmp_path, GRID.case(seed)) for seed in range(GRID.seeds)])
    rows = {row.name: row for row in done.rows()}
    assert list(rows) == ["fedit", "rolora", "fedsa", CENTRALISED]
    assert all(len(set(row.last)) > 1 or row.mean > 60 for row in rows.values())
    assert len({row.scores for row in rows.values()}) == len(rows)
    assert f"| fedsa | {rows['fedsa'].last[0]:.1f} |" in grid_table(done)


def test_an_interval_is_that_of_students_t() -> None:
    row = Row("x", ((0.0, 70.0), (0.0, 72.0), (0.0, 77.0)))
    assert row.mean == 73
    assert row.half_width == pytest.approx(4.3027 * 13**0.5 / 3**0.5, rel=1e-3)


def test_the_mean_weighs_updates_and_rounds_once() -> None:
    big, small = np.array([3.0, -1.0], np.float32), np.array([1e-8, 7.0], np.float32)
    found = mean([Outgoing(big, 3), Outgoing(small, 1)])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([(9 + float(small[0])) / 4, 1.0]))


def test_f1_counts_whole_entities() -> None:
    expected = [{("place", 0, 8), ("time", 9, 13)}, set()]
    found = [{("place", 0, 8), ("time", 9, 12)}, {("place", 0, 3)}]
    assert f1_percent(expected, found) == pytest.approx(100 * 2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2))


def test_a_tagger_that_knows_its_words_has_a_perfect_f1(tmp_path: Path) -> None:
    plan = save_tagger(tmp_path / "plan")
    test = tmp_path / "test.jsonl"
    row = {"words": ["New", "York", "noon"], "tags": ["B-place", "I-place", "B-time"]}
    test.write_text(json.dumps(row) + "\n")
    theta = read_adapter(tmp_path / "plan" / ADAPTER_FILE, plan.layout)
    judge = Judge(Trainer(tmp_path / "plan", plan, theta), Measure.ENTITY_F1, test)
    assert judge.score()(theta) == 100


@pytest.mark.parametrize(
    ("measure", "federated", "expected"),
    [
        (Measure.ACCURACY, 88.0, "yes"),
        (Measure.ACCURACY, 87.9, "**no**: 2.1 behind centralised, 2 allowed"),
        (Measure.PERPLEXITY, 60.0, "yes"),
        (
            Measure.PERPLEXITY,
            99.0,
            "**no**: no better than local-only; 9.0 behind centralised, 2 allowed",
        ),
    ],
)
def test_the_verdict_says_what_is_missing(
    measure: Measure, federated: float, expected: str
) -> None:
    scores = {FEDERATED: federated, CENTRALISED: 90.0, LOCAL: 70.0}
    results = {name: Result("", (score,), 0.0, 0.0) for name, score in scores.items()}
    case = replace(TOY, measure=measure, target=None, close=2.0)
    assert verdict(Compared(case, 3, 240, results)) == expected
