"""`fedloom-agent`: what a person types on the device. Only this module names concrete classes."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_agent.config import AgentConfig, load_agent_config, write_agent_config
from edge_agent.engine import Engine
from edge_agent.enrolment import join
from edge_agent.identity import fingerprint, load_identity
from edge_agent.participation import Device
from edge_agent.session import Session
from fedloom.errors import ConfigError, FedloomError
from fedloom.exports import export_model
from fedloom.logs import configure_logs
from fedloom.memory import limit_arenas
from fedloom.plans import Plan
from fedloom.terms import Protection
from fedloom.v1 import control_pb2
from fedloom.version import software

DEFAULT_HOME = Path("~/.fedloom/agent")
EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are one line on stderr and a status that is not 0."""
    options = _parser().parse_args(arguments)
    options.home = options.home.expanduser().resolve()
    limit_arenas()
    configure_logs(options.json)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        sys.exit(command(options))
    except FedloomError as error:
        print(f"fedloom-agent: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def _join(options: argparse.Namespace) -> int:
    token = options.token
    if token.startswith("@"):
        token = Path(token[1:]).read_text()
    identity = asyncio.run(join(options.home, token))
    if options.data is not None:
        write_agent_config(
            options.home,
            options.data.resolve(),
            options.text,
            options.label,
            None if options.held_out is None else options.held_out.resolve(),
            Protection[options.minimum_protection.upper()],
            options.threads,
        )
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


def _run(options: argparse.Namespace) -> int:
    config = load_agent_config(options.home)
    device = Device(
        options.home,
        load_identity(options.home),
        config.minimum_protection,
        lambda folder, plan: _onnx_engine(folder, plan, config),
        export_model,
        config.crypto_processes,
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


def _onnx_engine(folder: Path, plan: Plan, config: AgentConfig) -> Engine:
    from edge_agent.onnx_engine import OnnxEngine

    return OnnxEngine(folder, plan, config.data, config.held_out, threads=config.threads)


def _available_protections(minimum: Protection) -> frozenset[Protection]:
    """What this device can do; TenSEAL is looked for, not imported."""
    from importlib.util import find_spec

    possible = {Protection.PLAIN, Protection.MASKED}
    if find_spec("tenseal") and find_spec("zstandard"):
        possible |= {Protection.ENCRYPTED, Protection.SEALED}
    if max(possible) < minimum:
        raise ConfigError(
            "policy.minimum_protection",
            f'{minimum.name.lower()} needs TenSEAL, which is missing: pip install "fedloom[he]"',
        )
    return frozenset(possible)


def _infer(options: argparse.Namespace) -> int:
    from edge_agent.inference import Classifier

    texts = options.texts or [line.strip() for line in sys.stdin if line.strip()]
    folder = options.model or _current_model(options.home)
    predictions = Classifier(folder).classify(texts)
    for text, prediction in zip(texts, predictions, strict=True):
        if options.json:
            row = {"text": text, "label": prediction.label, "probability": prediction.probability}
            print(json.dumps(row))
        else:
            print(f"{prediction.label:24} {prediction.probability:6.1%}  {text}")
    return 0


def _current_model(home: Path) -> Path:
    pointer = home / "models" / "current"
    if not pointer.exists():
        raise ConfigError(str(home), "expected a model: finish a run first, or name one by --model")
    return pointer.parent / pointer.read_text().strip()


def _status(options: argparse.Namespace) -> int:
    identity = load_identity(options.home)
    config = load_agent_config(options.home)
    pointer = options.home / "models" / "current"
    _print(
        options,
        {
            "agent": identity.agent_id,
            "coordinator": identity.control_address,
            "authority_sha256": fingerprint(identity.authority),
            "certificate_until": identity.certificate.not_valid_after_utc.isoformat(),
            "minimum_protection": config.minimum_protection.name.lower(),
            "data": str(config.data.path),
            "model": str(_current_model(options.home)) if pointer.exists() else None,
        },
    )
    return 0


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("join", help="join a federation with a token")
    command.add_argument("token", help="the line that `invite` printed, or @FILE that holds it")
    command.add_argument("--data", type=Path, help="CSV, JSONL or Parquet to train on")
    command.add_argument("--held-out", type=Path, help="file to measure quality on")
    command.add_argument("--text", default="text", help="column of the text")
    command.add_argument("--label", default="label", help="column of the label")
    command.add_argument(
        "--minimum-protection",
        choices=[protection.name.lower() for protection in Protection],
        default=Protection.SEALED.name.lower(),
        help="decline runs that protect updates less",
    )
    command.add_argument(
        "--threads", type=int, default=0, help="threads to train with; 0: one for each core"
    )
    command.set_defaults(command=_join)

    command = commands.add_parser("run", help="take part in runs")
    command.add_argument("--once", action="store_true", help="end after one run")
    command.set_defaults(command=_run)

    command = commands.add_parser("infer", help="classify texts with the newest model")
    command.add_argument("texts", nargs="*", help="texts; without any, lines of stdin")
    command.add_argument("--model", type=Path, help="folder of an exported model")
    command.set_defaults(command=_infer)

    command = commands.add_parser("status", help="say who this device is and what it agreed to")
    command.set_defaults(command=_status)
    return parser


if __name__ == "__main__":
    main()
