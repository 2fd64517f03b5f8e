"""`fedloom-coordinator ca`: an authority whose key never comes near the coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.connection import DEFAULT_HOME, Home

ca_app = typer.Typer(
    help="Authority: keep its key offline, so that nobody at the coordinator can make up members.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(help="Folder of the authority.")]


@ca_app.command("create")
def create(
    folder: Folder,
    strict: Annotated[
        bool, typer.Option(help="Never permit an issuing key at the coordinator; devices see it.")
    ] = False,
) -> None:
    """Make an authority, on a machine that is not the coordinator."""
    from coordinator import ca

    ca.create(folder.expanduser(), strict)


@ca_app.command("requests")
def requests(
    out: Annotated[Path | None, typer.Option(help="File; default: requests.json.")] = None,
    renew: Annotated[
        bool, typer.Option(help="Ask for the coordinator's own certificates before they end.")
    ] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write what the authority shall sign into one file."""
    from coordinator import ca

    ca.write_all_requests(home.expanduser(), out, renew)


@ca_app.command("sign")
def sign(
    folder: Folder,
    requests_file: Annotated[Path, typer.Argument(help="What `ca requests` wrote.")],
    out: Annotated[Path, typer.Option(help="File of certificates.")] = Path("certificates.json"),
    issuing: Annotated[
        bool,
        typer.Option(help="Let the coordinator issue to devices. It can then make up members."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask. Leaves out names that had another key.")
    ] = False,
) -> None:
    """Show what is asked for, and sign it."""
    from coordinator import ca

    ca.sign(folder.expanduser(), requests_file, out, issuing, yes)


@ca_app.command("install")
def install(
    file: Annotated[Path, typer.Argument(help="What `ca sign` wrote.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Take over what the authority has signed. Agents need no restart of `serve`."""
    from coordinator import ca

    ca.take_over(home.expanduser(), file)
