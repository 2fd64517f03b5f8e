"""`fedloom-agent models`: the versions that this device made, and which of them answers."""

import argparse
import json
from typing import Any

from edge_agent.identity import load_identity
from edge_agent.model_versions import Active, ModelVersions
from edge_agent.statements import Statement
from fedloom.errors import ConfigError, Refused


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("models", help="versions of this device's models")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("list", help="say what there is, and what must not answer")
    action.set_defaults(command=list_models)
    action = actions.add_parser("rollback", help="answer with an older version, and stay with it")
    action.add_argument("version", nargs="?", type=int, help="the one before, if none is named")
    action.add_argument("--adapter", help="needed where there are several")
    action.set_defaults(command=rollback)
    action = actions.add_parser("follow", help="answer with the newest version again, and go on so")
    action.add_argument("--adapter", help="needed where there are several")
    action.set_defaults(command=follow)


def list_models(options: argparse.Namespace) -> int:
    """Print every version of every adapter."""
    models = _models(options)
    for adapter in models.adapters():
        active = _active(models, adapter)
        for said in models.versions(adapter):
            row = _row(adapter, said, active)
            print(json.dumps(row) if options.json else _line(row))
    return 0


def rollback(options: argparse.Namespace) -> int:
    """Activate an older version and hold it: the next round's must not undo it."""
    models, adapter = _models(options), _chosen(options)
    version = options.version
    if version is None:
        active = _active(models, adapter)
        older = [v for v in models.usable(adapter) if active is None or v < active.version]
        if not older:
            raise ConfigError(adapter, "expected an older version that may answer, found none")
        version = older[-1]
    return _activate(options, models, adapter, Active(version, held=True))


def follow(options: argparse.Namespace) -> int:
    """Activate the newest version that may answer; later ones will follow by themselves."""
    models, adapter = _models(options), _chosen(options)
    usable = models.usable(adapter)
    if not usable:
        raise ConfigError(adapter, "expected a version that may answer, found none")
    return _activate(options, models, adapter, Active(usable[-1]))


def _activate(
    options: argparse.Namespace, models: ModelVersions, adapter: str, chosen: Active
) -> int:
    said = models.activate(adapter, chosen)
    row = _row(adapter, said, chosen)
    print(json.dumps(row) if options.json else _line(row))
    return 0


def _models(options: argparse.Namespace) -> ModelVersions:
    key = load_identity(options.home).identity_key.public_key()
    return ModelVersions(options.home / "models", key)


def _chosen(options: argparse.Namespace) -> str:
    adapters = _models(options).adapters()
    name: str | None = options.adapter
    if name is None and len(adapters) == 1:
        return adapters[0]
    if name not in adapters:
        found = "none" if name is None else repr(name)
        raise ConfigError("--adapter", f"expected one of {adapters}, found {found}")
    return name


def _active(models: ModelVersions, adapter: str) -> Active | None:
    try:
        return models.active(adapter)
    except ConfigError:  # damaged: nothing answers until one is chosen
        return None


def _row(adapter: str, said: Statement | Refused, active: Active | None) -> dict[str, object]:
    if isinstance(said, Refused):
        return {"adapter": adapter, "state": "not ours", "reason": said.subject}
    is_active = active is not None and active.version == said.version
    state = "active" if is_active else "refused" if said.refused else "kept"
    if is_active and active is not None and active.held:
        state = "active, held"
    measured = said.evaluation
    return {
        "adapter": adapter,
        "version": said.version,
        "state": state,
        "reason": said.refused,
        "run": said.run,
        "round": said.round,
        "made_at": said.made_at,
        "accuracy": measured and measured.correct / measured.count,
        "loss": measured and measured.mean_loss,
    }


def _line(row: dict[str, Any]) -> str:
    if "version" not in row:
        return f"{row['adapter']:20}    {row['state']:12} {row['reason']}"
    quality = "not measured"
    if row["loss"] is not None:
        quality = f"accuracy {row['accuracy']:.1%}, loss {row['loss']:.4f}"
    reason = f": {row['reason']}" if row["reason"] else ""
    return (
        f"{row['adapter']:20} {row['version']:>3} {row['state']:12} "
        f"run {row['run'][:8]} round {row['round']}, {row['made_at']}, {quality}{reason}"
    )
