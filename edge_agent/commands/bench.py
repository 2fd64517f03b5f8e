"""`fedloom-agent bench`: how fast this device trains and answers, and what an adapter costs it."""

import argparse
import json
from pathlib import Path
from typing import Any

from edge_agent.identity import load_identity
from edge_agent.model_versions import ModelVersions
from fedloom.errors import ConfigError
from fedloom.graph_contracts import TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, load_plan

Figures = dict[str, dict[str, float]]


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("bench", help="measure training and answers on this device")
    command.add_argument("--adapter", help="name of the adapter; needed where there are several")
    command.add_argument("--model", type=Path, help="folder of an exported model instead")
    command.add_argument("--plan", type=Path, help="folder of a plan to measure training with")
    command.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    command.add_argument("--threads", type=int, default=0, help="0: one for each core")
    command.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> int:
    """Measure and print: the base model first, as the device had it before the adapter."""
    from edge_agent.speed import resident_bytes

    model, plan = _folders(options)
    if model is None and plan is None:
        raise ConfigError("bench", "expected a model or a plan: finish a round, or name one")
    figures: Figures = {"start": {"rss_mb": resident_bytes() / 1e6}}
    if model is not None:
        figures |= _answers(options, model)
    if plan is not None:
        figures["training"] = _training(options, plan)
    if options.json:
        print(json.dumps(figures))
        return 0
    for part, values in figures.items():
        for name, value in values.items():
            print(f"{part:14} {name:22} {value:12,.2f}")
    return 0


def _answers(options: argparse.Namespace, folder: Path) -> Figures:
    from edge_agent.inference import load_exported
    from edge_agent.speed import resident_bytes, time_answers, without_adapter

    adapter = load_exported(folder, options.threads)
    base = without_adapter(adapter.plan, adapter.theta)
    found: Figures = {}
    for part, theta in (("base", base), ("adapter", adapter.theta)):
        found[part] = time_answers(adapter, folder, theta, options.seconds)
        found[part]["rss_mb"] = resident_bytes() / 1e6
    found["adapter"]["theta_mb"] = adapter.theta.nbytes / 1e6
    return found


def _training(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    from edge_agent.speed import resident_bytes, time_training
    from fedloom.adapters import read_adapter

    plan = load_plan(folder)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    figures: dict[str, float] = time_training(folder, plan, theta, options.threads, options.seconds)
    return figures | {"peak_rss_mb": resident_bytes(peak=True) / 1e6}


def _folders(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Return the folders of model and plan: those that are named, else this device's own."""
    if options.model or options.plan:
        return options.model, options.plan
    from edge_agent.library import verified_plan

    models = ModelVersions(
        options.home / "models", load_identity(options.home).identity_key.public_key()
    )
    names = models.adapters()
    if options.adapter is None and not names:
        return None, _any_plan(options.home)
    name = options.adapter if options.adapter is not None else names[0]
    if name not in names or (options.adapter is None and len(names) > 1):
        raise ConfigError("--adapter", f"expected one of {names}")
    said = models.active_statement(name)
    if said is None:
        raise ConfigError(name, "expected an active version: fedloom-agent models list")
    folder, plan = models.path(name, said.version), options.home / "plans" / said.plan
    verified_plan(folder, said)
    return folder, plan if (plan / TRAIN_GRAPH).exists() else None


def _any_plan(home: Path) -> Path | None:
    found = sorted((home / "plans").glob(f"*/{TRAIN_GRAPH}"))
    return found[0].parent if found else None
