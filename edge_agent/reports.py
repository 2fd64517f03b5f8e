"""What reading a source has found: rows, classes, lengths, and what was left out and why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MAX_DISTINCT_LABELS = 65_536  # a column of texts in the place of labels must not fill the memory

_SHOWN = 24  # labels that are printed


class Cause(StrEnum):
    """Why a row is broken and left out."""

    UNPARSABLE = "cannot be parsed"
    NOT_UTF8 = "not UTF-8"
    TOO_LARGE = "too large"
    INCOMPLETE = "a text or label is missing"
    MISALIGNED = "words and tags differ in number"
    NOT_NUMBERS = "not finite numbers of the plan's shape"
    NOTHING_TO_LEARN = "nothing to learn within max_tokens"


@dataclass
class DataReport:
    """Figures of one reading; they stay on the device."""

    files: int = 0
    rows: int = 0  # usable ones, on this side of a split
    elsewhere: int = 0  # usable ones on the other side
    unknown_labels: int = 0  # rows skipped for that
    cut: int = 0  # rows longer than max_tokens
    broken: Counter[Cause] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # in tokens, after cutting
    scrubbed: Counter[str] = field(default_factory=Counter)  # replacements by kind

    @property
    def broken_rows(self) -> int:
        """Number of rows that were left out as broken."""
        return self.broken.total()

    def count_label(self, label: str) -> None:
        """Count one row's (or word's) label."""
        if label in self.labels or len(self.labels) < MAX_DISTINCT_LABELS:
            self.labels[label] += 1

    def to_json(self) -> dict[str, object]:
        """Return plain values, lengths as their quantiles."""
        return {
            "files": self.files,
            "rows": self.rows,
            "elsewhere": self.elsewhere,
            "unknown_labels": self.unknown_labels,
            "broken": {cause.value: count for cause, count in self.broken.items()},
            "labels": dict(self.labels.most_common()),
            "lengths": quantiles(self.lengths),
            "cut": self.cut,
            "scrubbed": dict(self.scrubbed),
        }


def told_report(report: Mapping[str, Any], unit: str = "tokens") -> Iterator[tuple[str, str]]:
    """Yield a report's plain values as lines for a person: what, and its value."""
    yield "files", str(report["files"])
    elsewhere = f", {report['elsewhere']} on the other side of the split"
    yield "rows", f"{report['rows']}" + (elsewhere if report["elsewhere"] else "")
    broken = report["broken"]
    causes = "; ".join(f"{cause}: {count}" for cause, count in broken.items())
    yield "broken rows", f"{sum(broken.values())}" + (f" ({causes})" if causes else "")
    if report["unknown_labels"]:
        yield "skipped", f"{report['unknown_labels']} rows of labels that the plan does not know"
    if labels := report["labels"]:
        shown = ", ".join(f"{label} {count}" for label, count in list(labels.items())[:_SHOWN])
        more = f", and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
        yield "labels", shown + more
    if lengths := report["lengths"]:
        cut = f"; {report['cut']} rows were cut" if report["cut"] else ""
        yield unit, ", ".join(f"{name} {value}" for name, value in lengths.items()) + cut
    if scrubbed := report["scrubbed"]:
        yield "replaced", ", ".join(f"{kind} {count}" for kind, count in scrubbed.items())


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Return the least, median, 95 % quantile and greatest of counted values; {} of none."""
    total, seen, found = counts.total(), 0, {}
    if not total:
        return {}
    for value in sorted(counts):
        seen += counts[value]
        for name, share in (("least", 0.0), ("median", 0.5), ("95 %", 0.95), ("greatest", 1.0)):
            if name not in found and seen >= share * total:
                found[name] = value
    return found
