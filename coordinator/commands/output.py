"""How answers look: one JSON document, or tables and lines that hold nothing a terminal obeys.

Names, labels, reasons and paths come from files and from other machines. What is not printable is
shown as an escape, and nothing is read as markup.
"""

import json
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 10_000
_STEPS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (0.0, "s"))


def safe(text: object) -> str:
    """Return the text with everything that is not printable as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: object) -> None:
    """Print one line of plain text."""
    typer.echo(safe(text))


def warn(texts: Iterable[str]) -> None:
    """Print warnings where they do not mix with the answer."""
    for text in texts:
        typer.echo(f"warning: {safe(text)}", err=True)


def say_json(document: Any) -> None:
    """Print one JSON document on one line."""
    typer.echo(json.dumps(document, allow_nan=False))


def console() -> "Console":
    """Return the terminal, or the file that takes its place."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def say_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings; an empty list says so."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(safe(cell), overflow="fold") for cell in row))
    if table.row_count:
        terminal = console()
        if not terminal.is_terminal:
            terminal.width = MAX_WIDTH  # a program that reads it finds every row on one line
        terminal.print(table)
    else:
        typer.echo("none", err=True)


def age(then: float | None, now: float) -> str:
    """Say how long ago something was, or how long it is until then."""
    if then is None:
        return "never"
    for seconds, unit in _STEPS:
        if abs(now - then) >= seconds:
            count = f"{abs(now - then) / (seconds or 1):.0f} {unit}"
            return f"{count} ago" if now >= then else f"in {count}"
    return ""


def day(then: float | None) -> str:
    """Return the local date and time, or nothing."""
    return "" if then is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(then))
