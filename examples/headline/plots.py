"""Two pictures: federated rounds between a case's other trainings, and a grid's trainings."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from examples.headline.comparison import CENTRALISED, FEDERATED, LOCAL, Compared
from examples.headline.grids import Gridded

_COLUMNS = 3
_COLOURS = {FEDERATED: "#1f5fa8", CENTRALISED: "#444444", LOCAL: "#c2571a"}


def draw(done: Sequence[Compared], path: Path) -> None:
    """Write a PNG with a panel for each case."""
    columns = min(_COLUMNS, len(done))
    rows = math.ceil(len(done) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.7 * rows), squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    for panel, one in zip(panels, done, strict=False):
        _panel(panel, one)
    for panel in panels[len(done) :]:
        panel.axis("off")
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _panel(axes: Axes, one: Compared) -> None:
    for name in (CENTRALISED, LOCAL):
        style = "--" if name == CENTRALISED else ":"
        axes.axhline(one.results[name].score, color=_COLOURS[name], linestyle=style, label=name)
    for name in (FEDERATED, *one.case.others):
        scores = one.results[name].scores
        every = one.case.score_every
        rounds = range(every, every * len(scores) + 1, every)
        axes.plot(rounds, scores, marker=".", color=_COLOURS.get(name), label=name)
    axes.set_title(one.case.name, fontsize=9)
    _labelled(axes, one.case.measure)


def draw_grids(done: Sequence[Gridded], path: Path) -> None:
    """Write a PNG with a panel for each grid: means over seeds, and from the least to the most."""
    figure, axes = pyplot.subplots(
        1, len(done), figsize=(5.1 * len(done), 3.4), squeeze=False, layout="constrained"
    )
    for panel, one in zip(axes.flat, done, strict=True):
        _grid_panel(panel, one)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _grid_panel(axes: Axes, one: Gridded) -> None:
    *federated, centralised = one.rows()
    axes.axhline(centralised.mean, color=_COLOURS[CENTRALISED], linestyle="--", label=CENTRALISED)
    every = one.grid.score_every
    for row in federated:
        by_round = list(zip(*row.scores, strict=True))
        rounds = range(every, every * len(by_round) + 1, every)
        (line,) = axes.plot(rounds, list(map(mean, by_round)), marker=".", label=row.name)
        lowest, highest = list(map(min, by_round)), list(map(max, by_round))
        axes.fill_between(rounds, lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_title(f"{one.grid.name}: mean and range of {len(one.seeds)} seeds", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    _labelled(axes, one.grid.measure)


def _labelled(axes: Axes, measure: str) -> None:
    axes.set_xlabel("round", fontsize=8)
    axes.set_ylabel(measure, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
