"""`fedloom-coordinator`: what an operator types. Only this module names concrete classes."""

import asyncio
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from coordinator.authority import Authority, load_root
from coordinator.ca import ca_app, warn_of_key_here, write_all_requests
from coordinator.config import load_run_config, unencodable
from coordinator.export import export_run
from coordinator.progress import read_progress, watch
from coordinator.server import (
    ServerConfig,
    load_server_config,
    open_published,
    open_store,
    serve,
    write_server_config,
)
from coordinator.signing import ROOT_KEY_FILE
from coordinator.store import RunRecord, Store
from fedloom.errors import ConfigError, FedloomError
from fedloom.logs import configure_logs
from fedloom.memory import limit_arenas
from fedloom.plans import load_plan, verify_members
from fedloom.secret_files import make_private_folder
from fedloom.tokens import SECRET_BYTES, EnrolmentToken

app = typer.Typer(
    help="Run federated training that this machine cannot read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Plans: what devices train.", no_args_is_help=True)
run_app = typer.Typer(help="Runs: rounds of training over a plan.", no_args_is_help=True)
agents_app = typer.Typer(help="Enrolled devices.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
app.add_typer(run_app, name="run")
app.add_typer(agents_app, name="agents")
app.add_typer(ca_app, name="ca")

Home = Annotated[Path, typer.Option("--home", help="Folder of this coordinator.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
DEFAULT_HOME = Path("~/.fedloom/coordinator")


def main() -> None:
    """Run one command; errors are one line on stderr and a status that is not 0."""
    try:
        app(standalone_mode=True)
    except FedloomError as error:
        Console(stderr=True).print(
            f"fedloom-coordinator: {error}", style="red", highlight=False, markup=False
        )
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


@app.command()
def init(
    home: Home = DEFAULT_HOME,
    address: Annotated[
        str, typer.Option(help="Host name or IP address that agents connect to.")
    ] = "localhost",
    listen: Annotated[str, typer.Option(help="Interface to listen on.")] = "[::]",
    control_port: Annotated[int, typer.Option(help="Port for agents.")] = 7070,
    enrolment_port: Annotated[int, typer.Option(help="Port for devices that join.")] = 7072,
    metrics_listen: Annotated[
        str, typer.Option(help="host:port of the page and /metrics, without login; empty: off.")
    ] = ServerConfig.metrics_listen,
    authority: Annotated[
        Path | None, typer.Option(help="root.pem of an authority that stays offline.")
    ] = None,
) -> None:
    """Make the authority, the server's keys, the store and coordinator.toml."""
    home = home.expanduser()
    root = None if authority is None else load_root(authority)
    make_private_folder(home)
    config = ServerConfig(
        address, listen, control_port, enrolment_port, metrics_listen=metrics_listen
    )
    if root is None:
        Authority.create(home, [address])
    else:
        Authority.adopt(home, root)
    write_server_config(home, config)
    open_store(home).close()
    if authority is not None:
        if (authority.parent / ROOT_KEY_FILE).exists():
            warn_of_key_here(authority.parent)
        write_all_requests(home)
    typer.echo(f"{home}: ready; agents will connect to {config.control_address}")


@app.command("serve")
def serve_command(
    home: Home = DEFAULT_HOME,
    until_idle: Annotated[bool, typer.Option(help="End when no run is left.")] = False,
    as_json: AsJson = False,
    log_level: Annotated[str, typer.Option(help="Least level: debug, info, warning.")] = "info",
) -> None:
    """Serve agents and execute runs."""
    limit_arenas()
    configure_logs(as_json, log_level)
    asyncio.run(serve(home.expanduser(), until_idle))


@app.command()
def invite(
    name: Annotated[str, typer.Option(help="The agent's name: a-z, 0-9 and '-'.")],
    home: Home = DEFAULT_HOME,
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 365, help="Validity.")] = 24.0,
    uses: Annotated[int, typer.Option(min=1, help="Devices; more than 1: NAME-1, NAME-2.")] = 1,
) -> None:
    """Print a token with which a device can join under this name."""
    home = home.expanduser()
    config, secret = load_server_config(home), os.urandom(SECRET_BYTES)
    token = EnrolmentToken(config.enrolment_address, secret, Authority.load(home).certificate_der)
    store = open_store(home)
    digest, ends = hashlib.sha256(secret).digest(), time.time() + 3600 * hours
    store.roster.add_invitation(digest, name, ends, uses)
    typer.echo(token.encode())


@agents_app.command("list")
def agents_list(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """List enrolled agents."""
    rows = open_store(home.expanduser()).roster.agents()
    if as_json:
        typer.echo(json.dumps([{"agent": a.agent_id, "enrolled_at": a.enrolled_at} for a in rows]))
        return
    table = Table("agent", "enrolled")
    for agent in rows:
        enrolled = time.strftime("%Y-%m-%d %H:%M", time.localtime(agent.enrolled_at))
        table.add_row(agent.agent_id, enrolled)
    Console().print(table)


@plan_app.command("build")
def plan_build(
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
) -> None:
    """Make a plan: what devices without torch train. Needs the extra `plan`."""
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
    plan = build_plan(request, out, typer.echo, cache)
    typer.echo(f"{out}: {plan.parameter_count:,} trainable parameters")


@plan_app.command("show")
def plan_show(folder: Path, as_json: AsJson = False) -> None:
    """Verify a plan's files and say what is in it."""
    plan = load_plan(folder)
    verify_members(plan, folder)
    facts: dict[str, Any] = {
        "name": plan.name,
        "id": hashlib.sha256(plan.encode()).hexdigest(),
        "base_model": plan.origin.base_model,
        "parameters": plan.parameter_count,
        "labels": len(plan.task.labels),
        "max_tokens": plan.task.max_tokens,
        "members": {member.name: member.size_bytes for member in plan.members},
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key:12} {value}")


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        labels = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"expected a JSON list of labels ({error})") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(str(path), "expected a JSON list of texts")
    return tuple(labels)


@run_app.command("start")
def run_start(file: Path, home: Home = DEFAULT_HOME) -> None:
    """Check a run file as a whole and queue the run; prints its id."""
    config = load_run_config(file)
    home = home.expanduser()
    load_server_config(home)
    plan, reference = open_published(home).put_plan(config.plan)
    if problem := unencodable(config.encoding, config.training, plan.parameter_count):
        raise ConfigError(str(file), f"this plan cannot be encoded for such a cohort: {problem}")
    run_id = os.urandom(16)
    open_store(home).add_run(run_id, config.name, file.read_text(), reference, time.time())
    typer.echo(run_id.hex())


@run_app.command("list")
def run_list(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """List runs."""
    runs = open_store(home.expanduser()).runs()
    if as_json:
        rows = [{"run": r.run_id.hex(), "name": r.name, "phase": r.phase.value} for r in runs]
        typer.echo(json.dumps(rows))
        return
    table = Table("run", "name", "round", "phase")
    for run in runs:
        table.add_row(run.run_id.hex(), run.name, str(run.round), run.phase.value)
    Console().print(table)


@run_app.command("watch")
def run_watch(
    run: Annotated[str, typer.Argument(help="Id or the start of one; default: the newest.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state once, as JSON.")] = False,
) -> None:
    """Follow a run to its end; exit status 1 when it fails."""
    store = open_store(home.expanduser())
    progress = read_progress(store, _find(store, run))
    if as_json:
        typer.echo(json.dumps(progress.to_json()))
    else:
        progress = watch(store, progress, Console())
    if progress.reason is not None:
        raise typer.Exit(1)


@run_app.command("export")
def run_export(
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    run: Annotated[str, typer.Argument(help="Id or the start of one; default: the newest.")] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a run's model where the coordinator can read it (protection `plain`)."""
    home = home.expanduser()
    store = open_store(home)
    folder = export_run(store, open_published(home), _find(store, run), out)
    typer.echo(f"{folder}: infer.onnx answers with the adapter of this run")


def _find(store: Store, prefix: str) -> RunRecord:
    found = [run for run in store.runs() if run.run_id.hex().startswith(prefix)]
    if not found or (prefix and len(found) > 1):
        raise ConfigError("run", f"expected the id of one run, found {len(found)} for {prefix!r}")
    return found[-1]
