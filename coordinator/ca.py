"""`fedloom-coordinator ca`: an authority whose key never comes near the coordinator."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.errors import ConfigError

if TYPE_CHECKING:  # at run time each command imports what it needs, and `run list` none of it
    from coordinator.signing import Standing
    from coordinator.signing_files import Granted, SigningRequest

REQUESTS_FILE = "requests.json"
ca_app = typer.Typer(
    help="Authority: keep its key offline, so that nobody at the coordinator can make up members.",
    no_args_is_help=True,
)
Home = Annotated[Path, typer.Option("--home", help="Folder of this coordinator.")]
Folder = Annotated[Path, typer.Argument(help="Folder of the authority.")]
DEFAULT_HOME = Path("~/.fedloom/coordinator")


@ca_app.command("create")
def create(
    folder: Folder,
    strict: Annotated[
        bool, typer.Option(help="Never permit an issuing key at the coordinator; devices see it.")
    ] = False,
) -> None:
    """Make an authority, on a machine that is not the coordinator."""
    from coordinator.signing import ROOT_FILE, ROOT_KEY_FILE, Root

    folder = folder.expanduser()
    warn_of_key_here(folder)
    Root.create(folder, strict)
    typer.echo(f"{folder / ROOT_FILE}: give it to `init --authority` at the coordinator")
    typer.echo(
        f"{folder / ROOT_KEY_FILE}: never leaves this folder; keep a copy of the folder safe"
    )


@ca_app.command("requests")
def requests(
    out: Annotated[Path | None, typer.Option(help=f"File; default: {REQUESTS_FILE}.")] = None,
    renew: Annotated[
        bool, typer.Option(help="Ask for the coordinator's own certificates before they end.")
    ] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write what the authority shall sign into one file."""
    write_all_requests(home.expanduser(), out, renew)


def write_all_requests(home: Path, out: Path | None = None, renew: bool = False) -> None:
    """Write the file of requests and say what is in it."""
    from coordinator.authority import Authority, Custody
    from coordinator.server import load_server_config, open_store
    from coordinator.signing import collect_requests
    from coordinator.signing_files import write_requests

    authority = Authority.load(home)
    if authority.custody is Custody.BESIDE:
        raise ConfigError(str(home), "has its authority beside it: there is nothing to be signed")
    store = open_store(home)
    address, now = load_server_config(home).address, datetime.now(UTC)
    found = collect_requests(home, address, store.roster, now, renew)
    store.close()
    out = home / REQUESTS_FILE if out is None else out
    write_requests(out, authority.certificate, found)
    for request in found:
        typer.echo(_line(request))
    if not found:
        typer.echo("nothing waits for a signature")
        return
    typer.echo(f"{out}: take it to the authority, `fedloom-coordinator ca sign FOLDER {out.name}`")


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
    from coordinator.signing import Root, Standing
    from coordinator.signing_files import Kind, read_requests, write_granted

    root = Root.load(folder.expanduser())
    wanted = []
    for request in read_requests(requests_file, root.certificate):
        standing = root.standing(request)
        typer.echo(f"{_line(request)}\n    {_verdict(request, standing, issuing)}")
        if request.kind is Kind.ISSUING and not issuing:
            continue
        if yes and standing is Standing.OTHER:
            typer.echo("    left out")
            continue
        wanted.append(request)
    if not wanted:
        raise ConfigError(str(requests_file), "expected something to sign, found nothing")
    if not yes:
        typer.confirm(f"Sign these {len(wanted)}?", abort=True)
    granted: list[Granted] = [root.sign(request) for request in wanted]
    write_granted(out, root.certificate, granted)
    typer.echo(f"{out}: take it to the coordinator, `fedloom-coordinator ca install {out.name}`")


@ca_app.command("install")
def install_command(
    file: Annotated[Path, typer.Argument(help="What `ca sign` wrote.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Take over what the authority has signed. Agents need no restart of `serve`."""
    from coordinator.authority import Authority
    from coordinator.server import open_store
    from coordinator.signing import install
    from coordinator.signing_files import read_granted

    home = home.expanduser()
    granted = read_granted(file, Authority.load(home).certificate)
    store = open_store(home)
    for line in install(home, store.roster, granted, time.time()):
        typer.echo(line)
    store.close()


def warn_of_key_here(folder: Path) -> None:
    """Say so when the authority's key lies on a coordinator's machine."""
    from coordinator.server import CONFIG_FILE

    coordinators = (folder, *folder.parents, DEFAULT_HOME.expanduser())
    if any((place / CONFIG_FILE).exists() for place in coordinators):
        typer.echo(
            f"warning: there is a coordinator on this machine, and {folder} is for the authority's "
            "key. Who reads both can make up members.",
            err=True,
        )


def _line(request: "SigningRequest") -> str:
    from coordinator.signing_files import Kind

    about = ", ".join(request.alternatives) if request.kind is Kind.SERVER else request.name
    return f"{request.kind.value:8} {about}\n    key {request.fingerprint}"


def _verdict(request: "SigningRequest", standing: "Standing", issuing: bool) -> str:
    from coordinator.signing_files import Kind

    if request.kind is Kind.ISSUING and not issuing:
        return "not signed: the authority itself signs for devices (--issuing changes that)"
    return standing.value
