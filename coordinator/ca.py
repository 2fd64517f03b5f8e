"""What `commands/ca.py` does: requests go to an authority elsewhere, certificates come back."""

import time
from datetime import UTC, datetime
from pathlib import Path

import typer

from coordinator.audit import AuditLog, local_operator
from coordinator.authority import Authority, Custody
from coordinator.commands.connection import DEFAULT_HOME
from coordinator.premises import CONFIG_FILE, load_server_config, open_store
from coordinator.signing import ROOT_FILE, ROOT_KEY_FILE, Root, Standing, collect_requests, install
from coordinator.signing_files import (
    Granted,
    Kind,
    SigningRequest,
    read_granted,
    read_requests,
    write_granted,
    write_requests,
)
from fedloom.errors import ConfigError

REQUESTS_FILE = "requests.json"


def create(folder: Path, strict: bool) -> None:
    """Make an authority and say where its files are."""
    warn_of_key_here(folder)
    Root.create(folder, strict)
    typer.echo(f"{folder / ROOT_FILE}: give it to `init --authority` at the coordinator")
    typer.echo(
        f"{folder / ROOT_KEY_FILE}: never leaves this folder; keep a copy of the folder safe"
    )


def write_all_requests(home: Path, out: Path | None = None, renew: bool = False) -> None:
    """Write the file of requests and say what is in it."""
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


def sign(folder: Path, requests_file: Path, out: Path, issuing: bool, yes: bool) -> None:
    """Show what is asked for, ask, and sign it."""
    root = Root.load(folder)
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


def take_over(home: Path, file: Path) -> None:
    """Install what the authority has signed and say what came of each."""
    granted = read_granted(file, Authority.load(home).certificate)
    store = open_store(home)
    audit = AuditLog(store.engine)
    for one, outcome in install(home, store.roster, granted, time.time()):
        if outcome.action is not None:
            audit.append(local_operator(), outcome.action, f"{one.kind.value} {one.name}")
        typer.echo(outcome.text)
    store.close()


def warn_of_key_here(folder: Path) -> None:
    """Say so when the authority's key lies on a coordinator's machine."""
    usual = DEFAULT_HOME.expanduser()
    coordinators = (folder, *folder.parents, usual)
    if any((place / CONFIG_FILE).exists() for place in coordinators):
        typer.echo(
            f"warning: there is a coordinator on this machine, and {folder} is for the authority's "
            "key. Who reads both can make up members.",
            err=True,
        )


def _line(request: SigningRequest) -> str:
    about = ", ".join(request.alternatives) if request.kind is Kind.SERVER else request.name
    return f"{request.kind.value:8} {about}\n    key {request.fingerprint}"


def _verdict(request: SigningRequest, standing: Standing, issuing: bool) -> str:
    if request.kind is Kind.ISSUING and not issuing:
        return "not signed: the authority itself signs for devices (--issuing changes that)"
    return standing.value
