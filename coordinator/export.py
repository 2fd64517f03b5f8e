"""The adapter of a finished run as a deployable model, where the coordinator can read it."""

import tomllib
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory

import crypto
from coordinator.config import RunConfig, parse_run_config
from coordinator.published import Published
from coordinator.store import RoundRecord, RunRecord, Store
from crypto import masked
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.exports import export_model
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan
from fedloom.strategies import algorithm
from fedloom.terms import Protection


def export_run(store: Store, published: Published, run: RunRecord, out: Path) -> Path:
    """Repeat the run's rounds from its sums and write the model; raises ConfigError if blind."""
    config = parse_run_config(tomllib.loads(run.config), Path(run.name))
    if config.encoding.protection.needs_tenseal:
        raise ConfigError(
            run.name,
            "this coordinator never could read the adapter; every agent has exported it to its "
            "own `models` folder",
        )
    plan = published.read_plan(run.plan)
    rule = algorithm(config.training)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name)
        _lay_out(plan, run, published, folder)
        state = rule.init(read_adapter(folder / ADAPTER_FILE, plan.layout))
        for record in store.rounds(run.run_id):
            path = folder / "sum"
            published.fetch(record.sum.sha256, path)
            with path.open("rb") as file:
                context = _context(run.run_id, config, plan, record)
                opened = _read_sum(config.encoding.protection, context, record.slots, file)
            path.unlink()
            state = rule.apply(state, opened.mean)
        export_model(folder, plan, state.theta, out)
    return out


def _context(
    run_id: bytes, config: RunConfig, plan: Plan, record: RoundRecord
) -> crypto.UpdateContext:
    return crypto.UpdateContext(
        run_id=run_id,
        round=record.round,
        attempt=record.attempt,
        parameter_count=plan.parameter_count,
        capacity=config.encoding.capacity,
        weight_cap=record.weight_cap,
        clip=record.clip,
        update_bits=config.encoding.update_bits,
        cohort=record.cohort_digest,
    )


def _read_sum(
    protection: Protection,
    context: crypto.UpdateContext,
    slots: tuple[int, ...],
    file: BufferedReader,
) -> crypto.OpenedSum:
    """Open a sum as only a coordinator that may read it can: nothing proves whose it is."""
    if protection is Protection.MASKED:
        return masked.read_sum(context, slots, file)
    return crypto.protection("plain").open_sum(context, None, slots, file)


def _lay_out(plan: Plan, run: RunRecord, published: Published, folder: Path) -> None:
    """Give the published artifacts their names as plan members again."""
    published.fetch(run.plan.sha256, folder / PLAN_FILE)
    for member in plan.members:
        published.fetch(member.sha256, folder / member.name)
