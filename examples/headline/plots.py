"""Two pictures: federated rounds between a case's other trainings, and a grid's trainings."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.headline.comparison import CENTRALISED, FEDERATED, LOCAL, Compared
from examples.headline.grids import Gridded, Row

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
    axes.set_xlabel("round", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(one.case.measure, fontsize=8)
    _plain(axes)


def draw_grids(done: Sequence[Gridded], path: Path) -> None:
    """Write a PNG with a panel for each grid."""
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
    if one.grid.score_every == one.grid.rounds:
        _at_the_end(axes, federated)
    else:
        _by_round(axes, federated, one.grid.score_every)
    axes.set_title(f"{one.grid.name}, {len(one.seeds)} seeds", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    axes.set_ylabel(one.grid.measure, fontsize=8)
    _plain(axes)


def _by_round(axes: Axes, rows: Sequence[Row], every: int) -> None:
    """Draw means over seeds, and the range from the least to the most."""
    for row in rows:
        by_round = list(zip(*row.scores, strict=True))
        rounds = range(every, every * len(by_round) + 1, every)
        (line,) = axes.plot(rounds, list(map(mean, by_round)), marker=".", label=row.name)
        lowest, highest = list(map(min, by_round)), list(map(max, by_round))
        axes.fill_between(rounds, lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xlabel("round (bands: least to most of the seeds)", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _at_the_end(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw means with their intervals, and every seed as a point."""
    for place, row in enumerate(rows):
        axes.bar(place, row.mean, yerr=row.half_width, capsize=4, color="#9dbbdd", width=0.6)
        axes.plot([place] * len(row.last), row.last, ".", color=_COLOURS[FEDERATED])
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mean and 95 % interval (points: seeds)", fontsize=8)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
