"""Records to the rows that a task learns from, checked; what is wrong with one is counted."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from edge_agent.data import DataSource, UnknownLabels
from edge_agent.records import Record, Selection, Values, data_files, records
from edge_agent.reports import Cause, DataReport
from edge_agent.scrubbing import Scrubber
from fedloom.errors import Reason, Refused

MAX_LABEL_CHARACTERS = 80  # of a label that a refusal may quote
T = TypeVar("T")


class BrokenRow(Exception):
    """A row that cannot be used."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


class UnknownLabel(Exception):
    """A row whose label is none of the plan's."""

    def __init__(self, label: str) -> None:
        super().__init__()  # not the label, which may be a text
        self.label = label


class Labels:
    """A plan's labels and their numbers; without a plan (None), those that are found."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = list(names or ())
        self._found_as_needed = names is None
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._longest = max(map(len, self.names), default=0)

    def number(self, label: str) -> int:
        """Return the label's number, or raise UnknownLabel."""
        number = self._numbers.get(label)
        if number is None:
            if not self._found_as_needed:
                raise UnknownLabel(label)
            number = self._numbers[label] = len(self.names)
            self.names.append(label)
        return number

    def refusal(self, label: str, record: Record) -> Refused:
        """Return the refusal of a source with such a label."""
        # Something much longer than every label is a text: the columns were mapped the wrong way
        # round, and a text must not leave the device.
        if len(label) > 2 * self._longest + 8:
            quoted = f"a value of {len(label)} characters"
        else:
            quoted = repr(label[:MAX_LABEL_CHARACTERS])
        return Refused(
            Reason.DATA_LABEL_UNKNOWN,
            f"expected one of the plan's {len(self._numbers)} labels, "
            f"found {quoted} in row {record.number} of {record.file}",
        )


class RowReader(Protocol[T]):
    """What a task makes of a record."""

    @property
    def selection(self) -> Selection:
        """What is read of each record."""
        ...

    @property
    def labels(self) -> Labels:
        """The plan's."""
        ...

    def row(self, values: Values) -> T:
        """Return the row; raises BrokenRow or UnknownLabel."""
        ...

    def content(self, row: T) -> Iterable[bytes]:
        """Return what the model is given of it, which decides its side of a split."""
        ...

    def scrubbed(self, row: T, scrubber: Scrubber) -> T:
        """Return the row without personal data."""
        ...

    def labels_of(self, row: T) -> Iterable[str]:
        """Return the labels to count."""
        ...


class Rows(Generic[T]):
    """Iterate once over the usable rows on a source's side; others are counted in `report`.

    Of a split, only the side that is trained on counts rows that belong to neither.

    Iterating raises Refused: DATA_UNREADABLE, DATA_COLUMN_MISSING, DATA_LABEL_UNKNOWN, or
    DATA_EMPTY at the end when no row was usable; and ConfigError for a format or a kind of
    scrubbing whose library is missing.
    """

    def __init__(
        self, source: DataSource, reader: RowReader[T], report: DataReport | None = None
    ) -> None:
        self.report = report or DataReport()
        self._source = source
        self._reader = reader

    def __iter__(self) -> Iterator[T]:
        report = self.report
        treatment, reader = self._source.treatment, self._reader
        scrubber = Scrubber(treatment.scrub, report.scrubbed) if treatment.scrub.kinds else None
        report.files = len(data_files(self._source.path, reader.selection.endings))
        for record in records(self._source.path, reader.selection):
            row = self._usable(record)
            if row is None:
                continue
            if treatment.part and not treatment.part.contains(reader.content(row)):
                report.elsewhere += 1
                continue
            report.rows += 1
            for label in reader.labels_of(row):
                report.count_label(label)
            yield reader.scrubbed(row, scrubber) if scrubber else row
        if not report.rows:
            raise nothing_usable(self._source, report)

    def _usable(self, record: Record) -> T | None:
        """Return the row, or count why there is none."""
        part = self._source.treatment.part
        report = DataReport() if part and part.held_out else self.report
        if isinstance(record.values, Cause):
            report.broken[record.values] += 1
            return None
        try:
            return self._reader.row(record.values)
        except BrokenRow as broken:
            report.broken[broken.cause] += 1
        except UnknownLabel as unknown:
            if self._source.treatment.unknown_labels is UnknownLabels.REFUSE:
                raise self._reader.labels.refusal(unknown.label, record) from None
            report.unknown_labels += 1
        return None


def nothing_usable(source: DataSource, report: DataReport) -> Refused:
    """Return the refusal of a source that gives nothing to learn from."""
    causes = ", ".join(f"{cause.value}: {count}" for cause, count in report.broken.most_common())
    found = f"none and {report.broken_rows} broken rows" + (f" ({causes})" if causes else "")
    if report.unknown_labels:
        found += f", {report.unknown_labels} of unknown labels"
    if report.elsewhere:
        found += f", {report.elsewhere} on the other side of the split"
    return Refused(Reason.DATA_EMPTY, f"expected usable rows in {source.path.name}, found {found}")
