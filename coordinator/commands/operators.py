"""`fedloom-coordinator operator …`: on the coordinator's own machine, by its own user."""

from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.connection import DEFAULT_HOME, AsJson, Home
from coordinator.commands.output import say, say_json

operator_app = typer.Typer(help="Operators on other machines.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The operator's name: a-z, 0-9 and '-'.")]


@operator_app.command("add")
def add(
    name: Name,
    out: Annotated[Path, typer.Option(help="New folder for the operator's key.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Admit an operator elsewhere; give them the folder, on a way that nobody else reads."""
    from coordinator.authority import load_server_identity
    from coordinator.operators import Operators

    home = home.expanduser()
    authority = load_server_identity(home).authority
    Operators(home).add(name, authority, out)
    _record(home, "OPERATOR_ADDED", name)
    say(f"{out}: use it with --coordinator HOST:PORT --operator FOLDER (`admin_listen`)")


@operator_app.command("list")
def list_operators(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """List the operators that are admitted from elsewhere."""
    from coordinator.operators import Operators

    names = Operators(home.expanduser()).names()
    if as_json:
        say_json(names)
        return
    for name in names:
        say(name)


@operator_app.command("remove")
def remove(name: Name, home: Home = DEFAULT_HOME) -> None:
    """Shut an operator out, from the next request on."""
    from coordinator.operators import Operators

    home = home.expanduser()
    Operators(home).remove(name)
    _record(home, "OPERATOR_REMOVED", name)
    say(f"{name}: removed")


def _record(home: Path, action: str, name: str) -> None:
    from coordinator.audit import Action, AuditLog, local_operator
    from coordinator.local_service import quiet_logs
    from coordinator.premises import open_store

    quiet_logs()
    store = open_store(home)
    AuditLog(store.engine).append(local_operator(), Action[action], name)
    store.close()
