"""`fedloom-coordinator`: what an operator types. Only this module names concrete classes.

Whatever concerns a coordinator that exists is a request to its AdminService, by `commands`; here is
what makes one and what runs it. Nothing heavy is imported before a command needs it.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.agents import agents_app, invitations_app, invite
from coordinator.commands.ca import ca_app
from coordinator.commands.connection import DEFAULT_HOME, AsJson, Home
from coordinator.commands.operators import operator_app
from coordinator.commands.output import safe
from coordinator.commands.plans import plan_app
from coordinator.commands.runs import run_app
from fedloom.errors import ConfigError, FedloomError
from simulation.command import simulate, tune

app = typer.Typer(
    help="Run federated training that this machine cannot read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(plan_app, name="plan")
app.add_typer(run_app, name="run")
app.add_typer(agents_app, name="agents")
app.add_typer(invitations_app, name="invitations")
app.add_typer(operator_app, name="operator")
app.add_typer(ca_app, name="ca")
app.command()(invite)
app.command()(simulate)
app.command()(tune)


def main() -> None:
    """Run one command; errors are one line on stderr and a status that is not 0."""
    try:
        app(standalone_mode=True)
    except FedloomError as error:
        typer.secho(f"fedloom-coordinator: {safe(error)}", fg="red", err=True)
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
    ] = "127.0.0.1:7071",
    authority: Annotated[
        Path | None, typer.Option(help="root.pem of an authority that stays offline.")
    ] = None,
) -> None:
    """Make the authority, the server's keys, the store and coordinator.toml."""
    from coordinator.authority import Authority, load_root
    from coordinator.ca import warn_of_key_here, write_all_requests
    from coordinator.premises import ServerConfig, open_store, write_server_config
    from coordinator.signing import ROOT_KEY_FILE
    from fedloom.secret_files import make_private_folder

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
    from coordinator.memory import collect_by_the_clock
    from coordinator.server import serve
    from fedloom.logs import configure_logs
    from fedloom.memory import limit_arenas

    limit_arenas()
    collect_by_the_clock()
    configure_logs(as_json, log_level)
    asyncio.run(serve(home.expanduser(), until_idle))
