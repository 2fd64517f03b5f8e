"""`fedloom-coordinator plan …`; building one happens here, on the machine that has torch."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.commands.connection import (
    DEFAULT_HOME,
    AsJson,
    Coordinator,
    Home,
    Operator,
    Where,
    reached,
)
from coordinator.commands.output import say, say_json, say_table
from fedloom.errors import ConfigError
from fedloom.plans import BaseStorage

if TYPE_CHECKING:
    from coordinator.commands.training_needs import TrainingNeeds
    from coordinator.summaries import PlanSummary

plan_app = typer.Typer(help="Plans: what devices train.", no_args_is_help=True)
SHORT_ID = 12


class StorageName(StrEnum):
    """What is typed for a BaseStorage."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


@plan_app.command("build")
def build(
    model: Annotated[
        str,
        typer.Option(help="Folder, installed package or hub id; package.name:factory of a module."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the plan.")],
    task: Annotated[
        str, typer.Option(help="classification, ner, causal-lm or module.")
    ] = "classification",
    labels: Annotated[Path | None, typer.Option(help="JSON list of the labels.")] = None,
    name: Annotated[str, typer.Option(help="Name, for people.")] = "",
    rank: Annotated[int | None, typer.Option(help="LoRA rank; 8.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; 16.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Adapted modules, or all-linear; the usual ones of the architecture."),
    ] = None,
    modules_to_save: Annotated[
        str | None, typer.Option(help="Modules that are trained whole, besides a new head.")
    ] = None,
    freeze_a: Annotated[
        bool | None, typer.Option("--freeze-a", help="Train LoRA's B alone (FFA-LoRA).")
    ] = None,
    residual: Annotated[
        bool | None,
        typer.Option(
            "--residual", help="With what FLoRA and FedEx-LoRA add to the adapted weights."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer texts are cut.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What a row begins with, such as 'Q: {question} A: '.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="What is learned, such as '{answer}'; {text}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial adapter and head.")] = 0,
    loss_pieces: Annotated[
        int | None, typer.Option(help="Pieces of a language model's loss, to save memory; 1.")
    ] = None,
    base: Annotated[
        StorageName, typer.Option(help="How the frozen matrices are stored and downloaded.")
    ] = StorageName.FP32,
    dp: Annotated[
        bool, typer.Option(help="With train_dp.onnx, which clips each row's gradient.")
    ] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of graphs made before for the same model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a plan: what devices without torch train. Needs the extra `plan`."""
    from coordinator.catalogue import facts_of
    from coordinator.plans import PlanRequest, build_plan, require_taken

    given: dict[str, Any] = {
        "labels": labels,
        "rank": rank,
        "alpha": alpha,
        "targets": _names(targets),
        "modules_to_save": _names(modules_to_save),
        "freeze_a": freeze_a,
        "residual": residual,
        "max_tokens": max_tokens,
        "prompt": prompt,
        "answer": answer,
        "loss_pieces": loss_pieces,
    }
    given = {option: value for option, value in given.items() if value is not None}
    require_taken(task, given)
    if labels is not None:
        given["labels"] = _read_labels(labels)
    given |= {"dp": dp, "base": BaseStorage[base.name]}
    request = PlanRequest(model=model, task=task, name=name or out.name, seed=seed, **given)
    plan = build_plan(request, out, (lambda _: None) if as_json else say, cache)
    if as_json:
        say_json({"folder": str(out), **facts_of(plan).to_json()})
    else:
        say(f"{out}: {plan.trained_count:,} trainable parameters")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        labels = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"expected a JSON list of labels ({error})") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(str(path), "expected a JSON list of texts")
    return tuple(labels)


@plan_app.command("list")
def list_plans(
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """List the plans that runs of this coordinator train."""
    with reached(Where(home, coordinator, operator)) as client:
        found = list(client.plans())
    if as_json:
        say_json([plan.to_json() for plan in found])
        return
    say_table(
        ("plan", "name", "task", "base model", "parameters", "runs", "damage"),
        (
            (
                plan.plan_id.hex()[:SHORT_ID],
                plan.name,
                plan.task.replace("_", " "),
                plan.base_model,
                f"{plan.parameters:,}",
                plan.runs,
                plan.damage,
            )
            for plan in found
        ),
    )


@plan_app.command("show")
def show(
    plan: Annotated[str, typer.Argument(help="A plan's folder, or its id, or the start of it.")],
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    layout: Annotated[bool, typer.Option("--layout", help="List a folder's tensors.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a training step of a folder's plan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify a plan's files and say what is in it; of a folder, also what training takes."""
    if Path(plan).is_dir():
        _show_folder(Path(plan), layout, measure, as_json)
        return
    if measure:
        raise ConfigError("--measure", f"expected a plan's folder, found {plan}")
    if layout:
        raise ConfigError("--layout", f"expected a plan's folder, found {plan}")
    with reached(Where(home, coordinator, operator)) as client:
        found = client.plan(plan.lower())
    _say_plan(found, as_json)
    if found.damage:
        raise typer.Exit(1)


@plan_app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A plan's folder.")],
    as_json: AsJson = False,
) -> None:
    """Check a plan as an agent would: hashes, the adapter's layout, the graphs' contracts."""
    from coordinator.plans import verify_plan

    verified = verify_plan(folder)
    if as_json:
        say_json({"folder": str(folder), "graphs": verified.graphs})
        return
    say(f"{len(verified.plan.members)} members are what their SHA-256 says")
    say(f"the adapter has the layout's {len(verified.plan.layout)} tensors")
    say(f"ONNX Runtime loads {', '.join(verified.graphs)}: they keep their contracts")


def _show_folder(folder: Path, layout: bool, measure: bool, as_json: bool) -> None:
    from coordinator.catalogue import facts_of
    from coordinator.commands.training_needs import training_needs
    from coordinator.plans import verify_plan

    plan = verify_plan(folder).plan
    if as_json and layout:
        say_json([[t.name, list(t.shape), t.offset, t.role.name.lower()] for t in plan.layout])
    elif layout:
        say_table(
            ("tensor", "shape", "offset", "role"),
            (
                (t.name, " x ".join(map(str, t.shape)), f"{t.offset:,}", t.role.name.lower())
                for t in plan.layout
            ),
        )
    else:
        _say_plan(facts_of(plan), as_json, training_needs(folder, plan, measure))


def _say_plan(found: "PlanSummary", as_json: bool, needs: "TrainingNeeds | None" = None) -> None:
    if as_json:
        say_json({**found.to_json(), **(needs.to_json() if needs else {})})
        return
    say_table(
        ("name", found.name),
        (
            ("id", found.plan_id.hex()),
            ("task", found.task.replace("_", " ")),
            ("base model", found.base_model),
            ("parameters", f"{found.parameters:,}"),
            *((f"  {p.role}", f"{p.parameters:,} in {p.tensors}") for p in found.parts),
            *((("labels", found.labels),) if found.labels else ()),
            *((("max tokens", found.max_tokens),) if found.max_tokens else ()),
            *((name, f"{size:,} bytes") for name, size in found.files),
            *(needs.lines() if needs else ()),
            *((("damage", found.damage),) if found.damage else ()),
        ),
    )
