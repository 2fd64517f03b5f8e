"""`fedloom-agent export`: write this device's own model in the forms that people use.

For a blind coordinator nobody else can. The device knows the run's terms and its own measurements,
and the card says no more.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.engine import Evaluation
from edge_agent.identity import load_identity
from edge_agent.invitations import agreed_terms
from edge_agent.model_versions import ModelVersions
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.model_cards import RoundFacts, RunFacts
from fedloom.plans import ADAPTER_FILE, Plan, load_plan


@dataclass(frozen=True)
class _Chosen:
    """An exported model, and where it comes from as far as that is known."""

    folder: Path
    plan: Plan
    run: str = ""  # hexadecimal
    round: int = 0
    evaluation: Evaluation | None = None  # after that round, on this device's held-out data


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("export", help="write a model of this device in other forms")
    command.add_argument("--out", type=Path, required=True, help="new folder for the model")
    command.add_argument(
        "--form",
        action="append",
        default=[],
        help="onnx (default), merged, merged-int8, peft, safetensors; several: a,b",
    )
    command.add_argument("--rank", type=int, help="prune the adapter to this rank")
    command.add_argument("--adapter", help="name of the adapter; needed where there are several")
    command.add_argument("--version", type=int, dest="number", help="default: the one that answers")
    command.add_argument("--model", type=Path, help="folder of an exported model instead")
    command.set_defaults(command=export)


def export(options: argparse.Namespace) -> int:
    """Write the forms."""
    from fedloom.adapters import read_adapter
    from fedloom.export_forms import TrainedModel, export_forms, read_forms
    from fedloom.model_cards import describe
    from fedloom.version import software

    forms = read_forms(options.form)
    chosen = _Chosen(options.model, load_plan(options.model)) if options.model else _own(options)
    plan = chosen.plan
    try:
        theta = read_adapter(chosen.folder / ADAPTER_FILE, plan.layout)
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
        ) from error
    description = describe(plan, _facts(options.home, chosen), software())
    model = TrainedModel(chosen.folder, plan, theta, description)
    if options.rank is not None:
        from fedloom.rank_pruning import pruned

        model = pruned(model, options.rank)
    exported = export_forms(model, forms, options.out)
    if options.json:
        said = {"folder": str(options.out), "files": exported.files, "compared": exported.compared}
        print(json.dumps(said))
        return 0
    for line in exported.lines(options.out):
        print(line)
    return 0


def _own(options: argparse.Namespace) -> _Chosen:
    """Return a version that this device signed, with every file as it was signed."""
    from edge_agent.library import verified_files

    key = load_identity(options.home).identity_key.public_key()
    models = ModelVersions(options.home / "models", key)
    names = models.adapters()
    name = options.adapter if options.adapter is not None or len(names) != 1 else names[0]
    if name not in names:
        raise ConfigError("--adapter", f"expected one of {names}, found {name or 'none'}")
    if options.number is not None:
        said = models.statement(name, options.number)
    elif (active := models.active_statement(name)) is not None:
        said = active
    else:
        raise ConfigError(name, "expected an active version: fedloom-agent models list")
    folder = models.path(name, said.version)
    return _Chosen(folder, verified_files(folder, said), said.run, said.round, said.evaluation)


def _facts(home: Path, chosen: _Chosen) -> RunFacts | None:
    terms = agreed_terms(home / "runs" / chosen.run) if chosen.run else None
    if terms is None:
        return None
    history: tuple[RoundFacts, ...] = ()
    if (measured := chosen.evaluation) is not None:
        accuracy = measured.correct / measured.count
        history = (
            RoundFacts(
                round=chosen.round,
                participants=None,
                accuracy=accuracy,
                evaluated=measured.count,
                loss=measured.mean_loss,
            ),
        )
    return RunFacts(
        run=chosen.run,
        name="",
        rounds=chosen.round,
        of=terms.rounds,
        privacy=terms.privacy,
        training=terms.training,
        encoding=terms.encoding,
        history=history,
        known_by="one of its agents",
    )
