"""From a round's state to a version that answers, or to the reason why it must not."""

import asyncio
from dataclasses import replace
from pathlib import Path

from edge_agent.engine import Engine, Evaluation
from edge_agent.model_versions import Candidate, ModelMaker, adapter_name
from edge_agent.statements import Statement
from edge_agent.undertaking import Surroundings, Undertaking
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import Refused
from fedloom.gates import ActivationGate
from fedloom.plans import ADAPTER_FILE


async def keep_state(
    models: ModelMaker,
    here: Surroundings,
    run: Undertaking,
    plan_folder: Path,
    theta: Theta,
    evaluation: Evaluation | None,
) -> None:
    """Keep the model that this device has of the run as a version that answers, if the gate does.

    The run does not depend on it: what goes wrong is a line in the log.
    """
    last = run.state.last.round
    candidate = Candidate(plan_folder, run.plan, theta, here.run_id, last, evaluation)
    try:
        said = await asyncio.to_thread(keep_model, models, run.engine, run.terms.gate, candidate)
    except (OSError, Refused) as error:
        here.log.warning("model not kept", round=last, problem=str(error))
        return
    here.log.info(
        "model refused" if said.refused else "model kept",
        adapter=said.adapter,
        version=said.version,
        round=said.round,
        reason=said.refused,
    )


def keep_model(
    models: ModelMaker, engine: Engine, gate: ActivationGate, candidate: Candidate
) -> Statement:
    """Add a round's model to the versions, once; what the gate refuses is listed, never used.

    A candidate without an evaluation is evaluated if the gate needs one.
    """
    name = adapter_name(candidate.plan)
    known = models.of_round(name, candidate.run_id, candidate.round)
    if known is not None:
        return known
    try:
        if candidate.evaluation is None and not gate.is_open:
            candidate = replace(candidate, evaluation=engine.evaluate(candidate.theta))
        active = _active_evaluation(models, engine, candidate) if gate.compares else None
        problem = gate_problem(gate, candidate.evaluation, active)
    except Refused as refused:  # a model that cannot be evaluated
        problem = refused.subject
    return models.add(replace(candidate, refused=problem))


def gate_problem(gate: ActivationGate, found: Evaluation | None, active: Evaluation | None) -> str:
    """Say which bound a model misses; "" when it passes. `active` None: nothing to compare with."""
    if gate.is_open:
        return ""
    if found is None:
        return "expected held-out data to measure it on ([held_out] in agent.toml), found none"
    accuracy, loss = found.correct / found.count, found.mean_loss
    least, most = gate.minimum_accuracy, gate.maximum_loss
    if least is not None and accuracy < least:
        return f"expected an accuracy of at least {least:.2%}, found {accuracy:.2%}"
    if most is not None and not loss <= most:
        return f"expected a loss of at most {most:.4f}, found {loss:.4f}"
    if active is None:
        return ""
    drop, rise = gate.maximum_accuracy_drop, gate.maximum_loss_rise
    used = active.correct / active.count
    if drop is not None and accuracy < used - drop:
        return (
            f"expected an accuracy of at most {drop:.2%} below the {used:.2%} of the model in "
            f"use, found {accuracy:.2%}"
        )
    if rise is not None and not loss <= active.mean_loss + rise:
        return (
            f"expected a loss of at most {rise:.4f} above the {active.mean_loss:.4f} of the model "
            f"in use, found {loss:.4f}"
        )
    return ""


def _active_evaluation(
    models: ModelMaker, engine: Engine, candidate: Candidate
) -> Evaluation | None:
    """Measure the model in use anew where the plan is the same: held-out data may have changed.

    That of another plan has what was measured when it was made.
    """
    active = models.active_statement(adapter_name(candidate.plan))
    if active is None:
        return None
    if active.plan != candidate.plan_sha256:
        return active.evaluation
    folder = models.path(active.adapter, active.version)
    try:
        return engine.evaluate(read_adapter(folder / ADAPTER_FILE, candidate.plan.layout))
    except (OSError, Refused):
        return active.evaluation
