"""`fedloom-agent data check`: what would be learned from this device's data, and what leaves it."""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.columns import Column
from edge_agent.config import AgentConfig, load_agent_config
from edge_agent.data import DataSource
from edge_agent.local_data import split_sources
from edge_agent.npz import npz_keys
from edge_agent.records import (
    ARCHIVES,
    TABLES,
    WORD_LISTS,
    Selection,
    Values,
    data_files,
    records,
)
from edge_agent.reports import Cause, DataReport, told_report
from edge_agent.row_readers import (
    LABELS,
    ArrayReader,
    ClassifiedText,
    ClassifiedTextReader,
    TaggedWordReader,
    TemplateReader,
    Templates,
    listed,
)
from edge_agent.rows import Labels, RowReader, Rows
from fedloom.errors import Reason, Refused
from fedloom.plans import PLAN_FILE, Plan, load_plan
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.quality import EvaluationTerms, Report
from fedloom.tasks import ArrayInput, ArrayLearning
from fedloom.terms import MINIMUM_SUM, Protection

_NAMES = ("train", "held_out")
_WORDS, _CHARACTERS = "words", "characters"
STAYS = (
    "the rows: their texts, words, tags, numbers and values, and the token ids made of them",
    "how many rows there are of each class, how long they are, which are held out, and what was "
    "replaced",
    "the paths of files, and the contents of columns that are not read",
)
REFUSALS = (
    "when the data cannot be used for a plan, a refusal: a file's name, the number of a row, the "
    "numbers of usable and broken rows, the names of columns, and a label that the plan does not "
    "know unless it is much longer than all that it knows"
)


@dataclass(frozen=True)
class Checked:
    """What one source holds for training."""

    name: str  # "train" or "held_out"
    source: DataSource
    report: DataReport
    unit: str  # of lengths


def add_data_command(commands: Any) -> None:
    """Add `data check` to the agent's commands."""
    group = commands.add_parser("data", help="look at this device's data")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    command = actions.add_parser(
        "check", help="say what would be learned from, what is broken, and what leaves the device"
    )
    command.add_argument(
        "--plan", type=Path, help="folder of a plan; without it the newest one of a run, if any"
    )
    # Not to be overwritten when it stands before the command.
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    command.set_defaults(command=check_data)


def check_data(options: argparse.Namespace) -> int:
    """Read all data once and print what was found; nothing is kept."""
    config = load_agent_config(options.home)
    folder = options.plan or _newest_plan(options.home)
    plan = None if folder is None else load_plan(folder)
    checked = [
        _checked(name, source, plan, folder)
        for name, source in zip(_NAMES, split_sources(options.home, config), strict=True)
        if source is not None
    ]
    if options.json:
        print(json.dumps(_as_json(config, plan, checked)))
        return 0
    print(f"plan      {_told_plan(plan)}")
    for one in checked:
        print(f"\n{one.name:9} {one.source.path}")
        for what, value in told_report(one.report.to_json(), one.unit):
            print(f"  {what:15} {value}")
    print("\nstays on this device")
    for line in STAYS:
        print(f"  {line}")
    print("\nmay leave it, in a run that protects as little as agent.toml permits")
    for party, learns in _leaves(config):
        print(f"  {party:24} {learns}")
    return 0


def _told_plan(plan: Plan | None) -> str:
    if plan is None:
        return "none yet: rows are counted, labels not compared"
    if isinstance(plan.task, ArrayLearning):
        return plan.name
    return f"{plan.name}, which takes {plan.task.max_tokens} tokens"


def _checked(name: str, source: DataSource, plan: Plan | None, folder: Path | None) -> Checked:
    if plan is not None and folder is not None:
        from edge_agent.examples import Reading, reading_of  # brings the tokenizer's library

        reading: Reading[Any] = reading_of(folder, plan, source)
        _exhaust(reading.blocks(), source)
        return Checked(name, source, reading.report, "tokens")
    reader, unit = _fitting_reader(source)
    rows: Rows[Any] = Rows(source, reader)
    _exhaust(_measured(rows, unit), source)
    return Checked(name, source, rows.report, unit)


def _exhaust(reading: Iterator[object], source: DataSource) -> None:
    try:
        for _ in reading:
            pass
    except Refused as refused:
        # A side that nothing was drawn for says so by its count.
        if not (source.treatment.part and refused.reason is Reason.DATA_EMPTY):
            raise


def _measured(rows: Rows[Any], unit: str) -> Iterator[object]:
    for row in rows:
        if unit == _WORDS:
            rows.report.lengths[len(row.words)] += 1
        elif unit == _CHARACTERS:
            texts = (row.text,) if isinstance(row, ClassifiedText) else row
            rows.report.lengths[sum(map(len, texts))] += 1
        yield row


def _fitting_reader(source: DataSource) -> tuple[RowReader[Any], str]:
    """Return a reader for what agent.toml and the columns look like, and the unit of lengths."""
    name = source.path.name.lower()
    if source.arrays or name.endswith(ARCHIVES):
        return ArrayReader(source, _seen_arrays(source), Labels(None)), ""
    if source.prompt is not None or source.answer is not None:
        templates = Templates(source.prompt or "", source.answer or "{text}")
        return TemplateReader(templates, Labels(())), _CHARACTERS
    words = TaggedWordReader(source, Labels(None))
    if name.endswith(WORD_LISTS):
        return words, _WORDS
    texts = ClassifiedTextReader(source, Labels(None))
    try:
        _first(source, texts.selection)
    except Refused as refused:
        try:
            _first(source, words.selection)
        except Refused:
            raise refused from None
        return words, _WORDS
    return texts, _CHARACTERS


def _first(source: DataSource, selection: Selection) -> Values:
    """Return the first record that can be parsed; raises Refused as `records`."""
    for record in records(source.path, selection):
        if not isinstance(record.values, Cause):
            return record.values
    return ()


def _seen_arrays(source: DataSource) -> ArrayLearning:
    """Return the task that the first row looks like."""
    mapping = dict(source.arrays)
    file = data_files(source.path, (*TABLES, *ARCHIVES))[0]
    keys = npz_keys(file) if file.name.lower().endswith(ARCHIVES) and not mapping else []
    names = [name for name in mapping or keys if name not in (LABELS, source.label)]
    columns: list[Column] = [mapping.get(name, (name,)) for name in names]
    learned = mapping.get(LABELS, (source.label,))
    first = _first(source, Selection((*columns, learned), (*TABLES, *ARCHIVES)))
    shapes = [_shape(value) for value in first]
    inputs = tuple(ArrayInput(name, shape) for name, shape in zip(names, shapes, strict=False))
    if LABELS in mapping and shapes:
        return ArrayLearning(inputs, values=math.prod(shapes[-1]))
    return ArrayLearning(inputs, ("any", "other"))


def _shape(value: object) -> tuple[int, ...]:
    try:
        return np.asarray(listed(value), np.float32).shape
    except (TypeError, ValueError, OverflowError):
        return ()  # a broken row, and counted as one


def _newest_plan(home: Path) -> Path | None:
    """Return the folder of the plan that this agent took up last."""
    plans = sorted((home / "plans").glob(f"*/{PLAN_FILE}"), key=lambda path: path.stat().st_mtime)
    return plans[-1].parent if plans else None


def _leaves(config: AgentConfig) -> Iterator[tuple[str, str]]:
    """Yield what a run that agent.toml permits may tell to whom, and what else is said."""
    in_clear = config.minimum_protection is Protection.PLAIN  # there a run may ask for it anyway
    report = Report.EACH if in_clear else config.permitted_report
    terms = PrivacyTerms(
        config.minimum_protection,
        config.permitted_release,
        MINIMUM_SUM,
        evaluation=EvaluationTerms(report),
    )
    yield "protection", config.minimum_protection.name.lower()
    yield from privacy_statement(terms).lines()
    yield "refusals", REFUSALS


def _as_json(config: AgentConfig, plan: Plan | None, checked: list[Checked]) -> dict[str, object]:
    return {
        "plan": plan.name if plan else None,
        **{
            one.name: {"path": str(one.source.path), "unit": one.unit, **one.report.to_json()}
            for one in checked
        },
        "stays": list(STAYS),
        "leaves": [list(line) for line in _leaves(config)],
    }
