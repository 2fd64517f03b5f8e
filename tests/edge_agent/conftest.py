"""Fixtures: the toy plan, whole or broken on purpose, and data for it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.data import DataSource
from tests.edge_agent.toy import INFER_TEXT, TRAIN_TEXT, Toy, save_toy, toy_rows, write_rows


@pytest.fixture
def make_toy(tmp_path: Path) -> Callable[..., Toy]:
    """Make a toy plan; the edits are (old, new) replacements in the text of a graph."""

    def make(
        name: str = "plan",
        train_edit: tuple[str, str] = ("", ""),
        infer_edit: tuple[str, str] = ("", ""),
        max_tokens: int = 16,
    ) -> Toy:
        texts = []
        for text, (old, new) in ((TRAIN_TEXT, train_edit), (INFER_TEXT, infer_edit)):
            assert old in text
            texts.append(text.replace(old, new) if old else text)
        return save_toy(tmp_path / name, texts[0], texts[1], max_tokens)

    return make


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    """The toy plan as it should be."""
    return make_toy()


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str, list[tuple[str, str]]], DataSource]:
    """Write rows under a header into a CSV file of that name."""
    return lambda name, rows: write_rows(tmp_path / name, rows)


@pytest.fixture
def train_data(tmp_path: Path) -> DataSource:
    """200 rows to train on."""
    return write_rows(tmp_path / "train.csv", toy_rows(200, seed=1))


@pytest.fixture
def held_out(tmp_path: Path) -> DataSource:
    """100 other rows."""
    return write_rows(tmp_path / "held_out.csv", toy_rows(100, seed=2))
