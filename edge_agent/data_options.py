"""Options of `fedloom-agent join` that say what the data are."""

import argparse
from dataclasses import replace
from pathlib import Path

from edge_agent.data import DataSource, Treatment, UnknownLabels
from edge_agent.scrubbing import Kind, Scrub
from fedloom.errors import ConfigError

_COLUMNS = ("text", "label", "words", "tags")
MAX_HELD_OUT = 0.5


def add_data_options(command: argparse.ArgumentParser) -> None:
    """Add them to a command's parser."""
    command.add_argument(
        "--data", type=Path, help="file or folder to train on: CSV, JSONL, Parquet, CoNLL or .npz"
    )
    command.add_argument("--held-out", type=Path, help="file to measure quality on")
    command.add_argument("--text", default="text", help="column of the text")
    command.add_argument("--label", default="label", help="column of the label")
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="column of text, label, words or tags; or columns and ranges of an array that the "
        "plan names, such as window=x0..x99,age",
    )
    command.add_argument("--prompt", help="template in place of the plan's: Q: {question}")
    command.add_argument("--answer", help="template in place of the plan's: {reply}")
    command.add_argument(
        "--split", type=float, default=0.0, metavar="SHARE", help="share of --data to hold out"
    )
    command.add_argument(
        "--unknown-labels",
        choices=[choice.value for choice in UnknownLabels],
        default=UnknownLabels.REFUSE.value,
        help="what to do about rows whose label the plan does not know",
    )
    command.add_argument(
        "--scrub",
        default="",
        metavar="KIND,...",
        help=f"personal data to replace before anything else: {', '.join(Kind)}",
    )
    command.add_argument("--phone-region", help="where numbers without a country's code belong: DE")
    command.add_argument(
        "--names-model", type=Path, help="folder of an exported model that tags names of persons"
    )


def chosen_sources(options: argparse.Namespace) -> tuple[DataSource, DataSource | None, float]:
    """Return what to train on, what is held out, and the share that is where nothing else is."""
    if not 0 <= options.split <= MAX_HELD_OUT:
        raise ConfigError("--split", f"expected 0..{MAX_HELD_OUT}, found {options.split}")
    if options.split and options.held_out:
        raise ConfigError("--split", "expected a share or --held-out, found both")
    model = options.names_model and options.names_model.resolve()
    scrub = Scrub(_kinds(options.scrub), options.phone_region, model)
    treatment = Treatment(UnknownLabels(options.unknown_labels), scrub)
    data = replace(_source(options, options.data), treatment=treatment)
    held_out = options.held_out and replace(data, path=options.held_out.resolve())
    return data, held_out, options.split


def _source(options: argparse.Namespace, path: Path) -> DataSource:
    columns = {"text": options.text, "label": options.label}
    arrays = []
    for given in options.column:
        name, equals, column = given.partition("=")
        if not (name and equals and column):
            raise ConfigError("--column", f"expected NAME=COLUMN, found {given!r}")
        if name in _COLUMNS:
            columns[name] = column
        else:
            arrays.append((name, tuple(column.split(","))))
    return DataSource(
        path.resolve(),
        **columns,
        prompt=options.prompt,
        answer=options.answer,
        arrays=tuple(arrays),
    )


def _kinds(given: str) -> tuple[Kind, ...]:
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in set(Kind):
            raise ConfigError("--scrub", f"expected some of {', '.join(Kind)}, found {name!r}")
    return tuple(Kind(name) for name in names)
