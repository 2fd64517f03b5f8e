"""Grids: one way to deal rows, several ways to train federated, each over several seeds.

A seed decides how rows are dealt and in which order they are taken. All trainings of a seed begin
with the same weights and have the same agents.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from examples.headline.cases import (
    ANNEALED,
    Case,
    Request,
    classifier,
    deal_banking,
    digits,
    network,
)
from examples.headline.comparison import CENTRALISED, FEDERATED, Compared
from examples.headline.rows import Dealt, by_dirichlet, chosen, count
from examples.headline.scores import Measure
from fedloom.terms import LocalTraining, LoraRule, Optimizer, Schedule, Strategy, Weighting

SEEDS = 3
_DIGITS = 10_000
_STUDENT = 4.303  # t of SEEDS - 1 degrees of freedom, two-sided, 95 %


@dataclass(frozen=True)
class Grid:
    """One table; what its fields say is said in `Case`."""

    name: str
    title: str
    data: str
    measure: Measure
    deal: Callable[..., Dealt]  # (folder, seed=...)
    request: Request
    terms: dict[str, LocalTraining]
    rounds: int
    score_every: int
    most_rows: int
    test_rows: int
    apart: LocalTraining
    seeds: int = SEEDS

    def case(self, seed: int) -> Case:
        """Return one seed's trainings as a case, whose federated one is the first of `terms`."""
        (_, first), *others = self.terms.items()
        return Case(
            name=f"{self.name}-{seed}",
            title=self.title,
            data=self.data,
            measure=self.measure,
            deal=partial(self.deal, seed=seed),
            request=self.request,
            terms=first,
            others=dict(others),
            rounds=self.rounds,
            score_every=self.score_every,
            most_rows=self.most_rows,
            test_rows=self.test_rows,
            apart=self.apart,
            alone_too=False,
            seed=seed,
        )


@dataclass(frozen=True)
class Row:
    """What one training of a grid reached, by seed."""

    name: str
    scores: tuple[tuple[float, ...], ...]  # of each seed, after each scored round

    @property
    def last(self) -> tuple[float, ...]:
        """Each seed's last score."""
        return tuple(scores[-1] for scores in self.scores)

    @property
    def mean(self) -> float:
        """Of the last scores."""
        return mean(self.last)

    @property
    def half_width(self) -> float:
        """Half of the mean's 95 % confidence interval (Student's t); NaN but for SEEDS seeds."""
        if len(self.last) != SEEDS:
            return math.nan
        return _STUDENT * stdev(self.last) / math.sqrt(SEEDS)


@dataclass(frozen=True)
class Gridded:
    """A grid with what its trainings reached."""

    grid: Grid
    seeds: Sequence[Compared]

    def rows(self) -> Iterator[Row]:
        """Yield the federated trainings as the grid has them, then the centralised one."""
        kept = zip(self.grid.terms, (FEDERATED, *self.seeds[0].case.others), strict=True)
        for name, key in (*kept, (CENTRALISED, CENTRALISED)):
            yield Row(name, tuple(one.results[key].scores for one in self.seeds))


def grid_table(done: Gridded) -> str:
    """Return the grid in Markdown, the figures of every seed beside their mean."""
    grid, seeds = done.grid, range(len(done.seeds))
    rows = "/".join(f"{one.rows:,}" for one in done.seeds)
    lines = [
        f"**{grid.name}**: {grid.title}; {rows} rows, {grid.rounds} rounds; {grid.measure}",
        "",
        "| training | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean, 95 % interval |",
        "|---|" + "---:|" * (len(seeds) + 1),
    ]
    for row in done.rows():
        figures = " | ".join(f"{score:.1f}" for score in row.last)
        lines.append(f"| {row.name} | {figures} | {row.mean:.1f} ± {row.half_width:.1f} |")
    return "\n".join(lines) + "\n"


def _deal_mnist(folder: Path, seed: int) -> Dealt:
    whole = digits(folder, "train")
    # A part of all rows, and not of each agent's: agents' sizes differ, which FedNova is about.
    order = np.random.default_rng(seed).permutation(count(whole))
    train, labels = chosen(whole, order[:_DIGITS]), whole["label"][order[:_DIGITS]].tolist()
    agents = by_dirichlet(train, labels, 10, 0.1, seed)
    return Dealt(agents, digits(folder, "test"))


_SGD = LocalTraining(optimizer=Optimizer.SGD, learning_rate=0.05, batch_size=32)
_STRATEGIES = {
    "FedAvg": _SGD,
    "FedProx, mu 0.1": replace(_SGD, strategy=Strategy.FED_PROX, proximal_mu=0.1),
    "SCAFFOLD": replace(
        _SGD,
        strategy=Strategy.SCAFFOLD,
        weighting=Weighting.UNIFORM,
        population=10,
        auxiliary_scale=1.0,
    ),
    "FedAdam": replace(
        _SGD,
        strategy=Strategy.FED_ADAM,
        server_learning_rate=0.01,
        server_momentum=0.9,
        server_second_momentum=0.99,
        server_adaptivity=1e-3,
    ),
    "FedNova": replace(_SGD, strategy=Strategy.FED_NOVA, auxiliary_scale=1.0),
}
# Rules whose server takes the mean. Others need every device's factors: the coordinator's own work.
_LORA_RULES = (LoraRule.FEDIT, LoraRule.FFA, LoraRule.ROLORA, LoraRule.FEDSA)
# Ten times the local rate and ten times the adaptivity: the server's steps stay the same, and what
# an agent keeps to itself (fedsa's B) moves by more than a thousandth.
_LORA = replace(
    ANNEALED,
    batch_size=2,
    learning_rate=10 * ANNEALED.learning_rate,
    server_adaptivity=10 * ANNEALED.server_adaptivity,
    server_learning_rate=0.015,
    warmup_rounds=4,
)

GRIDS = (
    Grid(
        name="mnist-skewed",
        title="digits, Dirichlet 0.1 over 10 agents",
        data="mnist/mnist.npz",
        measure=Measure.ACCURACY,
        deal=_deal_mnist,
        request=network,
        terms=_STRATEGIES,
        rounds=20,
        score_every=2,
        most_rows=0,
        test_rows=10_000,
        apart=replace(_SGD, epochs=4),
    ),
    Grid(
        name="banking77-lora",
        title="77 intents, Dirichlet 0.1 over 20 agents",
        data="banking77/train.csv.gz",
        measure=Measure.ACCURACY,
        deal=partial(deal_banking, agents=20, alpha=0.1),
        request=classifier,
        terms={rule.name.lower(): replace(_LORA, lora=rule) for rule in _LORA_RULES},
        rounds=28,
        score_every=28,  # fedsa has 20 models to measure
        most_rows=40,
        test_rows=200,
        apart=LocalTraining(learning_rate=3e-3, epochs=2, step_schedule=Schedule.COSINE),
    ),
)
