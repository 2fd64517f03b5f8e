"""Split a labelled text data set over agents whose label mixes differ.

For each label the agents' shares are drawn from a Dirichlet distribution (Hsu, Qi and Brown,
arXiv:1909.06335, section 3.1, with the roles of clients and labels exchanged, as is usual): the
smaller alpha, the less alike the agents. The seed stands in the files' names.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.data import DataSource
from edge_agent.row_readers import read_texts
from fedloom.errors import ConfigError

_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
HELD_OUT_SHARE = 0.2  # of a data set that comes as one file

Row = tuple[str, str]  # (text, label)


@dataclass(frozen=True)
class AgentFiles:
    """What one agent trains on, and its part of the held-out rows."""

    train: Path
    held_out: Path
    rows: int
    labels: int


def read_data_set(path: Path, text: str, label: str) -> tuple[list[Row], list[Row]]:
    """Return (train, held-out) rows of a folder with train and test files, or of one file."""
    if path.is_dir():
        return (
            _rows(_find(path, "train"), text, label),
            _rows(_find(path, "test"), text, label),
        )
    rows = _rows(path, text, label)
    order = np.random.default_rng(0).permutation(len(rows))
    cut = int(len(rows) * HELD_OUT_SHARE)
    return [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]]


def split(
    train: Sequence[Row],
    held_out: Sequence[Row],
    agents: int,
    alpha: float,
    seed: int,
    folder: Path,
) -> list[AgentFiles]:
    """Write each agent's files into `folder`; the held-out rows are dealt out evenly."""
    generator = np.random.default_rng(seed)
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in train:
        by_label[row[1]].append(row)
    parts: list[list[Row]] = [[] for _ in range(agents)]
    for label in sorted(by_label):
        rows = by_label[label]
        shares = generator.dirichlet(np.full(agents, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        order = generator.permutation(len(rows))
        for part, chosen in zip(parts, np.split(order, cuts), strict=True):
            part.extend(rows[index] for index in chosen)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"dirichlet{alpha:g}-seed{seed}"
    files = []
    for number, part in enumerate(parts, 1):
        generator.shuffle(part)
        trained = folder / f"agent-{number}-train-{name}.csv"
        held = folder / f"agent-{number}-held-out.csv"
        _write(trained, part)
        _write(held, held_out[number - 1 :: agents])
        files.append(AgentFiles(trained, held, len(part), len({label for _, label in part})))
    return files


def write_labels(rows: Sequence[Row], path: Path) -> int:
    """Write the sorted labels of the rows as a JSON list; return their number."""
    labels = sorted({label for _, label in rows})
    path.write_text(json.dumps(labels, ensure_ascii=False) + "\n")
    return len(labels)


def _find(folder: Path, stem: str) -> Path:
    for suffix in _SUFFIXES:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    names = ", ".join(stem + suffix for suffix in _SUFFIXES)
    raise ConfigError(str(folder), f"expected one of {names}")


def _rows(path: Path, text: str, label: str) -> list[Row]:
    return list(read_texts(DataSource(path, text, label)))


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
