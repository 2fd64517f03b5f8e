"""Rows of a case, how they are dealt to agents, and the files in which engines read them."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Records = list[dict[str, Any]]  # of texts
Arrays = dict[str, NDArray[Any]]  # each (N, ...), by column
Rows = Records | Arrays
VALIDATION_ROWS = 100  # of each agent


@dataclass(frozen=True)
class Dealt:
    """What each agent has, and the rows on which everyone's model is measured."""

    agents: tuple[Rows, ...]
    test: Rows

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield all agents' rows, where they are texts."""
        for rows in self.agents:
            if not isinstance(rows, Mapping):
                yield from rows


def count(rows: Rows) -> int:
    """Return N."""
    return len(next(iter(rows.values()))) if isinstance(rows, Mapping) else len(rows)


def chosen(rows: Rows, places: Sequence[int] | NDArray[np.int64]) -> Rows:
    """Return the rows at these places."""
    if isinstance(rows, Mapping):
        return {name: array[np.asarray(places)] for name, array in rows.items()}
    return [rows[int(place)] for place in places]


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts: what a centralised training has."""
    arrays = [part for part in parts if isinstance(part, Mapping)]
    if arrays:
        return {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    return [row for part in parts if not isinstance(part, Mapping) for row in part]


def shortened(dealt: Dealt, most: int, test: int) -> Dealt:
    """Return `most` rows of each agent and `test` of the test's, drawn by chance; 0: all."""

    def some(rows: Rows, limit: int) -> Rows:
        if not limit:
            return rows
        order = np.random.default_rng(0).permutation(count(rows))
        return chosen(rows, order[:limit])

    return Dealt(tuple(some(rows, most) for rows in dealt.agents), some(dealt.test, test))


def held_back(dealt: Dealt, most: int) -> Dealt:
    """Return rows to choose settings by: none of the test's, and none that `shortened` gives.

    Each agent holds back a fifth of its rows where `most` (0: all) would leave fewer, and at most
    `VALIDATION_ROWS`; all agents' together stand in the test's place.
    """
    train, held = [], []
    for rows in dealt.agents:
        order = np.random.default_rng(0).permutation(count(rows))  # as `shortened`
        kept = min(most or len(order), len(order) * 4 // 5)
        train.append(chosen(rows, order[:kept]))
        held.append(chosen(rows, order[kept:][:VALIDATION_ROWS]))
    return Dealt(tuple(train), joined(held))


def by_column(rows: Records, column: str) -> tuple[Rows, ...]:
    """Deal out to one agent for each value of a column, in the values' order."""
    groups: dict[str, Records] = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return tuple(groups[value] for value in sorted(groups))


def evenly(rows: Rows, agents: int, seed: int = 0) -> tuple[Rows, ...]:
    """Deal out by chance, as many to each."""
    order = np.random.default_rng(seed).permutation(count(rows))
    return tuple(chosen(rows, order[number::agents]) for number in range(agents))


def by_dirichlet(
    rows: Rows, labels: Sequence[Any], agents: int, alpha: float, seed: int = 0
) -> tuple[Rows, ...]:
    """Deal each label out in shares drawn from a Dirichlet distribution; see examples/split.py."""
    generator = np.random.default_rng(seed)
    places: list[list[int]] = [[] for _ in range(agents)]
    found = np.asarray(labels)
    for label in np.unique(found):
        of_label = generator.permutation(np.flatnonzero(found == label))
        cuts = np.cumsum(generator.dirichlet([alpha] * agents))[:-1] * len(of_label)
        for agent, part in zip(places, np.split(of_label, cuts.astype(int)), strict=True):
            agent.extend(part.tolist())
    return tuple(chosen(rows, agent) for agent in places)


def read_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool] = bool) -> Records:
    """Return the rows of a .jsonl.gz that are to be kept."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [row for line in file if keep(row := json.loads(line))]


def write_rows(stem: Path, rows: Rows) -> Path:
    """Write rows in a format that the agent reads; return the file."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, Mapping):
        path = stem.with_name(f"{stem.name}.npz")
        with path.open("wb") as archive:
            np.savez(archive, **rows)  # type: ignore[arg-type]
        return path
    path = stem.with_name(f"{stem.name}.jsonl")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
