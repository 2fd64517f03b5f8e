"""`fedloom-agent`: what a person types on the device. It and `engines` name concrete classes."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from edge_agent.commands import bench, evaluate, export, infer, models
from edge_agent.config import AgentConfig, load_agent_config, write_agent_config
from edge_agent.data_check import add_data_command
from edge_agent.data_options import add_data_options, chosen_sources
from edge_agent.engines import engine_maker
from edge_agent.enrolment import join
from edge_agent.identity import Identity, fingerprint, load_identity
from edge_agent.invitations import Terms, kept_invitation, read_terms, unfinished_runs
from edge_agent.local_data import data_reports, on_this_device
from edge_agent.model_versions import ModelMaker, ModelVersions
from edge_agent.participation import Device
from edge_agent.reports import told_report
from edge_agent.resources import MEGABYTE, Resources
from edge_agent.session import Session
from edge_agent.status import read_status, told
from fedloom.errors import RULES, ConfigError, FedloomError, Reaction, Refused
from fedloom.logs import LEVELS, configure_logs
from fedloom.memory import limit_arenas
from fedloom.privacy import privacy_statement
from fedloom.terms import Protection, Release
from fedloom.v1 import control_pb2
from fedloom.version import software

DEFAULT_HOME = Path("~/.fedloom/agent")
EXIT_FAILED = 1
EXIT_USAGE = 2
_ADVICE = {
    Reaction.ENROL: "; ask the federation's operator for a new token, then: fedloom-agent join",
    Reaction.UPGRADE: '; upgrade, then start again: pip install --upgrade "fedloom[agent]"',
    Reaction.STOP: "; ask the federation's operator",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are one line on stderr and a status that is not 0."""
    options = _parser().parse_args(arguments)
    options.home = options.home.expanduser().resolve()
    limit_arenas()
    configure_logs(options.json, options.log_level)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        sys.exit(command(options))
    except FedloomError as error:
        print(f"fedloom-agent: {error}{_advice(error)}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def _advice(error: FedloomError) -> str:
    """Return what a person can do about a refusal that trying again cannot mend."""
    if not isinstance(error, Refused):
        return ""
    return _ADVICE.get(RULES[error.reason].reaction, "")


def _join(options: argparse.Namespace) -> int:
    token = options.token
    if token.startswith("@"):
        token = Path(token[1:]).read_text()
    identity = asyncio.run(join(options.home, token, _wait_for_signature))
    if options.data is not None:
        data, held_out, held_out_share = chosen_sources(options)
        config = AgentConfig(
            data,
            held_out,
            Protection[options.minimum_protection.upper()],
            Release[options.permit_release.upper()],
            options.threads,
            held_out_share=held_out_share,
            memory_mb=options.memory_mb,
        )
        write_agent_config(options.home, config)
    _print(
        options,
        {
            "agent": identity.agent_id,
            "coordinator": identity.control_address,
            "authority_sha256": fingerprint(identity.authority),
            "home": str(options.home),
        },
    )
    return 0


def _wait_for_signature(fingerprint: str) -> None:
    print(
        f"SHA-256 of this device's key: {fingerprint}\n"
        "The authority is offline: tell its operator this line, who compares it before signing.\n"
        "Waiting. Ctrl-C loses nothing: the same command goes on.",
        file=sys.stderr,
    )


def _run(options: argparse.Namespace) -> int:
    config = on_this_device(options.home, load_agent_config(options.home))
    identity = load_identity(options.home)
    made = ModelMaker(
        options.home / "models", identity.agent_id, identity.identity_key, config.kept_models
    )
    device = Device(
        options.home,
        identity,
        config.minimum_protection,
        engine_maker(options.home, config),
        made,
        config.permitted_release,
        config.crypto_processes,
        Resources(config.memory_mb * MEGABYTE),
        config.permitted_report,
        config.availability,
        config.engine_name,
        config.tells_capability,
    )
    session = Session(device, _available_protections(config.minimum_protection))
    return asyncio.run(_run_session(session, options.once))


async def _run_session(session: Session, once: bool) -> int:
    running = asyncio.create_task(session.run())
    if not once:
        await running
    finished = asyncio.create_task(session.finished.get())
    await asyncio.wait({running, finished}, return_when=asyncio.FIRST_COMPLETED)
    if not finished.done():
        running.result()  # raises what ended the session
    running.cancel()
    completed = finished.result().outcome == control_pb2.RUN_OUTCOME_COMPLETED
    return 0 if completed else EXIT_FAILED


def _available_protections(minimum: Protection) -> frozenset[Protection]:
    """What this device can do; TenSEAL is looked for, not imported."""
    from importlib.util import find_spec

    possible = {Protection.PLAIN, Protection.MASKED}
    zstandard = sys.version_info >= (3, 14) or (
        find_spec("backports") and find_spec("backports.zstd")
    )
    if find_spec("tenseal") and zstandard:
        possible |= {Protection.ENCRYPTED, Protection.SEALED}
    if max(possible) < minimum:
        raise ConfigError(
            "policy.minimum_protection",
            f'{minimum.name.lower()} needs TenSEAL, which is missing: pip install "fedloom[he]"',
        )
    return frozenset(possible)


def _status(options: argparse.Namespace) -> int:
    identity = load_identity(options.home)
    config = load_agent_config(options.home)
    facts: dict[str, str | None] = {
        "agent": identity.agent_id,
        "coordinator": identity.control_address,
        "authority_sha256": fingerprint(identity.authority),
        "certificate_until": identity.certificate.not_valid_after_utc.isoformat(),
        "minimum_protection": config.minimum_protection.name.lower(),
        "release": config.permitted_release.name.lower(),
        "data": str(config.data.path),
        "models": ", ".join(_answering(options.home, identity)) or None,
    }
    status, runs = read_status(options.home), _open_runs(options.home)
    reports = data_reports(options.home)
    if options.json:
        activity = None if status is None else status.to_json()
        told_runs = [_told(terms) for terms in runs]
        print(json.dumps({**facts, "status": activity, "runs": told_runs, "read": reports}))
        return 0
    _print(options, {**facts, **told(status)})
    for name, report in reports.items():
        print(f"\n{name}, as read for the last run")
        for what, value in told_report(report):
            print(f"  {what:24} {value}")
    for terms in runs:
        print(f"\nrun {terms.run_id.hex()[:8]}: {terms.encoding.protection.name.lower()}")
        for party, learns in privacy_statement(terms.privacy).lines():
            print(f"  {party:24} {learns}")
    return 0


def _answering(home: Path, identity: Identity) -> Iterator[str]:
    """Yield the adapters that answer, and with which version."""
    found = ModelVersions(home / "models", identity.identity_key.public_key())
    for adapter in found.adapters():
        if (said := found.active_statement(adapter)) is not None:
            yield f"{adapter} {said.version} (round {said.round} of run {said.run[:8]})"


def _open_runs(home: Path) -> list[Terms]:
    """Return what was agreed in the runs that this device takes part in."""
    terms = []
    for run_id in unfinished_runs(home / "runs"):
        message = kept_invitation(home / "runs" / run_id.hex())
        with suppress(Refused):  # kept by another version
            if message is not None:
                terms.append(read_terms(message))
    return terms


def _told(terms: Terms) -> dict[str, object]:
    return {
        "run": terms.run_id.hex(),
        "protection": terms.encoding.protection.name.lower(),
        "release": terms.release.name.lower(),
        "minimum": terms.minimum,
        "privacy": list(privacy_statement(terms.privacy).lines()),
    }


def _print(options: argparse.Namespace, facts: dict[str, str | None]) -> None:
    if options.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:20} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedloom-agent", description="Train where the data is.")
    parser.add_argument("--version", action="version", version=software())
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="folder of this agent")
    parser.add_argument("--json", action="store_true", help="answers and logs as JSON lines")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="least level of logs")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("join", help="join a federation with a token")
    command.add_argument("token", help="the line that `invite` printed, or @FILE that holds it")
    add_data_options(command)
    command.add_argument(
        "--minimum-protection",
        choices=[protection.name.lower() for protection in Protection],
        default=Protection.SEALED.name.lower(),
        help="decline runs that protect updates less",
    )
    command.add_argument(
        "--permit-release",
        choices=[release.name.lower() for release in Release],
        default=Release.AGENTS.name.lower(),
        help="whether runs may return the opened sums to the coordinator too",
    )
    command.add_argument(
        "--threads", type=int, default=0, help="threads to train with; 0: one for each core"
    )
    command.add_argument(
        "--memory-mb", type=int, default=0, help="memory to train in; 0: what the system has"
    )
    command.set_defaults(command=_join)

    command = commands.add_parser("run", help="take part in runs")
    command.add_argument("--once", action="store_true", help="end after one run")
    command.set_defaults(command=_run)

    infer.add_parser(commands)
    models.add_parser(commands)
    bench.add_parser(commands)
    export.add_parser(commands)
    evaluate.add_parser(commands)

    command = commands.add_parser(
        "status", help="say what this device is doing and why, and who learns what"
    )
    command.set_defaults(command=_status)

    add_data_command(commands)
    return parser


if __name__ == "__main__":
    main()
