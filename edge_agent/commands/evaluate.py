"""`fedloom-agent evaluate`: quality of an exported model on a labelled file."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_agent.data_options import add_data_options, chosen_sources
from fedloom.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "evaluate", help="measure an exported model on a labelled file; needs no federation"
    )
    command.add_argument("--model", type=Path, required=True, help="folder of an exported model")
    add_data_options(command)
    command.add_argument("--threads", type=int, default=0, help="0: one for each core")
    # Not to be overwritten when it stands before the command.
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    command.set_defaults(command=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    """Measure and print."""
    from edge_agent.model_quality import measure

    if options.data is None:
        raise ConfigError("--data", "expected a labelled file to measure on")
    if options.held_out is not None or options.split:
        raise ConfigError("--data", "expected all of one file, found --held-out or --split too")
    source, _, _ = chosen_sources(options)
    found = measure(options.model, source, options.threads)
    if options.json:
        print(json.dumps(asdict(found)))
        return 0
    broken = f", {found.broken_rows:,} broken rows left out" if found.broken_rows else ""
    print(f"{found.model}: {found.rows:,} rows, {found.labels:,} labels{broken}")
    for name, value in found.metrics.items():
        print(f"  {name:20} {value:.4f}")
    return 0
