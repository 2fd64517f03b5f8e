"""The table: on a terminal with lines and colours, in a file as Markdown."""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.figures import MEGABYTE, Figures


class Column(NamedTuple):
    """A heading and the width that its values need."""

    heading: str
    width: int


COLUMNS = (
    Column("N", 10),
    Column("K", 2),
    Column("protection", 10),
    Column("s/round", 8),
    Column("bare TLS", 8),
    Column("ratio", 6),
    Column("bare", 8),
    Column("ratio", 6),
    Column("MB up", 7),
    Column("MB down", 7),
    Column("coord. MB", 9),
    Column("agent MB", 8),
    Column("coord. CPU s", 12),
    Column("agent CPU s", 11),
    Column("targets", 0),
)


def row(figures: Figures) -> tuple[str, ...]:
    """Return one line of the table."""
    case, product = figures.case, figures.product
    return (
        f"{case.parameters:,}",
        str(case.agents),
        case.protection,
        f"{figures.seconds:.3f}",
        f"{statistics.median(figures.bare_tls):.4f}",
        f"{figures.ratio_tls:.1f}x",
        f"{statistics.median(figures.bare_insecure):.4f}",
        f"{figures.ratio_insecure:.1f}x",
        f"{product.bytes_up / MEGABYTE:.2f}",
        f"{product.bytes_down / MEGABYTE:.2f}",
        f"{product.coordinator.peak_bytes / MEGABYTE:.0f}",
        f"{product.agent.peak_bytes / MEGABYTE:.0f}",
        f"{product.coordinator.cpu_seconds:.3f}",
        f"{product.agent.cpu_seconds:.3f}",
        _verdict(figures),
    )


def _verdict(figures: Figures) -> str:
    targets = list(figures.targets())
    missed = [target for target in targets if not target.met]
    if not targets:
        return "none"
    if not missed:
        return "met"
    return "missed: " + ", ".join(
        f"{target.name} {target.value:.4g} > {target.limit:g}" for target in missed
    )


def as_markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """Return the table as aligned Markdown."""
    headings = tuple(column.heading for column in COLUMNS)
    rules = tuple("-" * max(3, len(heading) - 1) + ":" for heading in headings[:-1])
    return "\n".join(_line(cells) for cells in (headings, (*rules, "---"), *rows))


def _line(cells: tuple[str, ...]) -> str:
    padded = (cell.rjust(column.width) for cell, column in zip(cells, COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"


def as_table(rows: Iterable[tuple[str, ...]]) -> Table:
    """Return the table for a terminal."""
    table = Table(title="A round without training")
    for column in COLUMNS[:-1]:
        table.add_column(column.heading, justify="right")
    table.add_column(COLUMNS[-1].heading)
    for *cells, verdict in rows:
        style = "red" if verdict.startswith("missed") else "green"
        table.add_row(*cells, f"[{style}]{verdict}[/]")
    return table


def print_report(figures: list[Figures]) -> None:
    """Print the table where the reader is."""
    rows = [row(one) for one in figures]
    console = Console()
    if console.is_terminal:
        console.print(as_table(rows))
    else:
        print(as_markdown(rows))
