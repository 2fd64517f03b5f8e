"""`fedloom-agent export`: write this device's own model in the forms that people use.

For a blind coordinator nobody else can. The device knows the run's terms and its own measurements,
and the card says no more.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.engine import Evaluation
from edge_agent.invitations import agreed_terms
from fedloom.errors import Reason, Refused
from fedloom.model_cards import RoundFacts, RunFacts
from fedloom.plans import ADAPTER_FILE


@dataclass(frozen=True)
class ChosenModel:
    """An exported model on this device, and where it comes from as far as that is known."""

    folder: Path
    run: str = ""  # hexadecimal
    round: int = 0  # 0: not known
    evaluation: Evaluation | None = None  # after that round, on this device's held-out data


Choose = Callable[[argparse.Namespace], ChosenModel]  # when no folder is named


def add_parser(commands: Any, choose: Choose) -> None:
    """Add the command; `choose` returns the model that answers on this device."""
    command = commands.add_parser("export", help="write this device's model in other forms")
    command.add_argument("--out", type=Path, required=True, help="new folder for the model")
    command.add_argument(
        "--form",
        action="append",
        default=[],
        help="onnx (default), merged, merged-int8, peft, safetensors; several: a,b",
    )
    command.add_argument("--model", type=Path, help="folder of an exported model instead")
    command.set_defaults(command=lambda options: export(options, choose))


def export(options: argparse.Namespace, choose: Choose) -> int:
    """Write the forms."""
    from fedloom.adapters import read_adapter
    from fedloom.export_forms import TrainedModel, export_forms, read_forms
    from fedloom.model_cards import describe
    from fedloom.plans import load_plan
    from fedloom.version import software

    forms = read_forms(options.form)
    chosen = ChosenModel(options.model) if options.model else choose(options)
    plan = load_plan(chosen.folder)
    try:
        theta = read_adapter(chosen.folder / ADAPTER_FILE, plan.layout)
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
        ) from error
    description = describe(plan, _facts(options.home, chosen), software())
    exported = export_forms(
        TrainedModel(chosen.folder, plan, theta, description), forms, options.out
    )
    if options.json:
        said = {"folder": str(options.out), "files": exported.files, "compared": exported.compared}
        print(json.dumps(said))
        return 0
    for line in exported.lines(options.out):
        print(line)
    return 0


def _facts(home: Path, chosen: ChosenModel) -> RunFacts | None:
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
