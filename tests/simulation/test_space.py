"""What a search may vary: everything wrong with it is named at once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import known_keys
from fedloom.errors import ConfigError
from simulation.space import Choice, Interval, load_space, nested, stated_values


def space(folder: Path, text: str):
    (folder / "space.toml").write_text(text)
    return load_space(folder / "space.toml")


def test_every_form_is_read(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        """
        "training.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
        "training.gradient_clip" = { low = 0, high = 2, step = 0.5 }
        "training.batch_size" = [8, 16]
        [training]
        epochs = { low = 1, high = 4 }
        strategy = ["fed_avg", "fed_prox"]
        proximal_mu = [0, 0.1]
        [evaluation]
        tell = [true, false]
        """,
    )
    assert found == {
        "training.learning_rate": Interval(1e-4, 1e-2, whole=False, log=True),
        "training.gradient_clip": Interval(0.0, 2.0, whole=False, step=0.5),
        "training.batch_size": Choice((8, 16)),
        "training.epochs": Interval(1, 4, whole=True, step=1),
        "training.strategy": Choice(("fed_avg", "fed_prox")),
        "training.proximal_mu": Choice((0.0, 0.1)),
        "evaluation.tell": Choice((True, False)),
    }
    assert found["training.gradient_clip"].has(1.5)
    assert not found["training.gradient_clip"].has(1.25)
    assert not found["training.epochs"].has(5)


WRONG = {
    '"training.learning_rat" = [0.1]': "training.learning_rat: unknown key",
    '"training.epochs" = {low = 1.5, high = 3}': "training.epochs: expected low as int",
    '"training.batch_size" = {low = 8, high = 8}': "training.batch_size: expected low < high",
    '"training.learning_rate" = {low = 0, high = 1, log = true}': "expected low above 0",
    '"training.momentum" = {low = 0, high = 1, setp = 2}': "found setp",
    '"training.strategy" = {low = 1, high = 2}': "training.strategy: expected a list of str",
    '"training.optimizer" = ["sgd", "lamb"]': "training.optimizer: expected one of",
    '"evaluation.tell" = [1, 0]': "evaluation.tell: expected a list of bool",
    '"cohort.size" = [4, 4]': "cohort.size: expected different values",
    '"cohort.quorum" = 3': "cohort.quorum: expected a list, or a table",
    '"rounds" = {low = 1, high = 8, log = true}': "rounds: expected no log",
}


@pytest.mark.parametrize(("text", "problem"), WRONG.items())
def test_a_problem_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        space(tmp_path, text)
    assert problem in refused.value.problem


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        space(tmp_path, "\n".join(WRONG))
    for problem in WRONG.values():
        assert problem in refused.value.problem
    with pytest.raises(ConfigError, match="at least one key"):
        space(tmp_path, "")


@given(st.dictionaries(st.sampled_from(sorted(known_keys())), st.integers(), min_size=1))
def test_nested_tables_say_what_dotted_keys_do(values: dict[str, int]) -> None:
    assert stated_values(nested(values), [*values, "nothing.of.this"]) == values
