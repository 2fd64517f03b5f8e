"""Which columns a row is read from: names, and ranges of names that make one array."""

import re
from collections.abc import Sequence
from pathlib import Path

from fedloom.errors import Reason, Refused

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")

Column = str | tuple[str, ...]  # a column's name; or names and ranges `a..b` that are one array
Names = str | list[str]  # the same with ranges written out
Place = int | list[int]


def flat(names: Sequence[Names]) -> list[str]:
    """Return every name once."""
    every = [[name] if isinstance(name, str) else name for name in names]
    return list(dict.fromkeys(name for several in every for name in several))


def column_places(path: Path, columns: Sequence[Column], found: list[str]) -> list[Place]:
    """Return where the columns stand among those that a file has; refuses as `column_names`."""
    return [
        found.index(name) if isinstance(name, str) else [found.index(one) for one in name]
        for name in column_names(path, columns, found)
    ]


def column_names(path: Path, columns: Sequence[Column], found: list[str]) -> list[Names]:
    """Return the names of each column, ranges written out.

    Raises Refused(DATA_COLUMN_MISSING) that says what is there.
    """
    names: list[Names] = []
    for column in columns:
        several = (column,) if isinstance(column, str) else column
        expanded = [name for one in several for name in _range(path, one, found)]
        names.append(expanded[0] if len(several) == 1 and expanded == [several[0]] else expanded)
    return names


def _range(path: Path, name: str, found: list[str]) -> list[str]:
    if name in found:
        return [name]
    first, dots, last = name.partition("..")
    if dots:
        start, end = (found.index(_existing(path, one, found)) for one in (first, last))
        if start <= end:
            return found[start : end + 1]
    return [_existing(path, name, found)]


def _existing(path: Path, column: str, found: list[str]) -> str:
    if column in found:
        return column
    # In a file without a header the first row stands here: only plain words are quoted.
    names = [name for name in found if _PLAIN_NAME.fullmatch(name)][:16]
    others = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
    raise Refused(
        Reason.DATA_COLUMN_MISSING,
        f"expected a column {column[:40]!r} in {path.name}, "
        f"found: {', '.join(names) or 'no plain name'}{others}",
    )
