"""One small picture: each case's federated rounds between its two other trainings."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from examples.headline.comparison import CENTRALISED, FEDERATED, LOCAL, Compared

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
    axes.set_ylabel(one.case.measure, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
