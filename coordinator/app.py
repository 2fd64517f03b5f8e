"""`fedloom-coordinator`: what an operator types. Only this module names concrete classes.

Whatever concerns a coordinator that exists is a request to its AdminService, by `commands`; here is
what makes one and what runs it. Nothing heavy is imported before a command needs it.
"""

import asyncio
from typing import Annotated

import typer

from coordinator.commands.agents import agents_app, invitations_app, invite
from coordinator.commands.connection import DEFAULT_HOME, AsJson, Home
from coordinator.commands.operators import operator_app
from coordinator.commands.output import safe
from coordinator.commands.plans import plan_app
from coordinator.commands.runs import run_app
from fedloom.errors import ConfigError, FedloomError

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
app.command()(invite)


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
) -> None:
    """Make the authority, the server's keys, the store and coordinator.toml."""
    from coordinator.authority import Authority
    from coordinator.server import ServerConfig, open_store, write_server_config
    from fedloom.secret_files import make_private_folder

    home = home.expanduser()
    make_private_folder(home)
    config = ServerConfig(address, listen, control_port, enrolment_port)
    Authority.create(home, [address])
    write_server_config(home, config)
    open_store(home).close()
    typer.echo(f"{home}: ready; agents will connect to {config.control_address}")


@app.command("serve")
def serve_command(
    home: Home = DEFAULT_HOME,
    until_idle: Annotated[bool, typer.Option(help="End when no run is left.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve agents and execute runs."""
    from coordinator.server import serve
    from fedloom.logs import configure_logs
    from fedloom.memory import limit_arenas

    limit_arenas()
    configure_logs(as_json)
    asyncio.run(serve(home.expanduser(), until_idle))
