"""`fedloom-coordinator plan …`; building one happens here, on the machine that has torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from coordinator.summaries import PlanSummary

plan_app = typer.Typer(help="Plans: what devices train.", no_args_is_help=True)
SHORT_ID = 12


@plan_app.command("build")
def build(
    model: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    labels: Annotated[Path, typer.Option(help="JSON list of the labels.")],
    out: Annotated[Path, typer.Option(help="New folder for the plan.")],
    name: Annotated[str, typer.Option(help="Name, for people.")] = "",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 16.0,
    targets: Annotated[str, typer.Option(help="Adapted modules.")] = "query,value",
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the initial adapter and head.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of graphs made before for the same model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a plan: what devices without torch train. Needs the extra `plan`."""
    from coordinator.catalogue import facts_of
    from coordinator.plans import PlanRequest, build_plan

    request = PlanRequest(
        model=model,
        labels=_read_labels(labels),
        name=name or out.name,
        rank=rank,
        alpha=alpha,
        targets=tuple(targets.split(",")),
        max_tokens=max_tokens,
        seed=seed,
    )
    plan = build_plan(request, out, (lambda _: None) if as_json else say, cache)
    if as_json:
        say_json({"folder": str(out), **facts_of(plan).to_json()})
    else:
        say(f"{out}: {plan.parameter_count:,} trainable parameters")


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
        ("plan", "name", "base model", "parameters", "runs", "damage"),
        (
            (
                plan.plan_id.hex()[:SHORT_ID],
                plan.name,
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
    as_json: AsJson = False,
) -> None:
    """Verify a plan's files and say what is in it."""
    if Path(plan).is_dir():
        found = _verified(Path(plan))
    else:
        with reached(Where(home, coordinator, operator)) as client:
            found = client.plan(plan.lower())
    if as_json:
        say_json(found.to_json())
    else:
        say_table(
            ("name", found.name),
            (
                ("id", found.plan_id.hex()),
                ("base model", found.base_model),
                ("parameters", f"{found.parameters:,}"),
                ("labels", found.labels),
                ("max tokens", found.max_tokens),
                *((name, f"{size:,} bytes") for name, size in found.files),
                *((("damage", found.damage),) if found.damage else ()),
            ),
        )
    if found.damage:
        raise typer.Exit(1)


def _verified(folder: Path) -> "PlanSummary":
    from coordinator.catalogue import facts_of
    from fedloom.plans import load_plan, verify_members

    plan = load_plan(folder)
    verify_members(plan, folder)
    return facts_of(plan)
