"""A run file against everything that decides whether its run can be executed: all of it at once.

`coordinator.config` knows what the file says; what only this coordinator knows is checked here.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.config import RunConfig, parse_run_config, unencodable
from coordinator.selection import fewest_agents
from fedloom.errors import ConfigError, FedloomError, Refused
from fedloom.plans import ADAPTER_FILE, Plan, Role, load_plan, verify_members
from fedloom.quality import metrics_of
from fedloom.tasks import ArrayLearning
from fedloom.terms import LoraRule, Personal, Protection, Strategy

MAX_FILE_BYTES = 1 << 20
# No protection sends more per value, and none more than this beyond it (headers, counters).
UPDATE_BYTES_PER_VALUE, UPDATE_BYTES_MORE = 4, 1 << 16
_PLAN_ID = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class RunFile:
    """What the operator wrote; `folder` is where its relative paths start, None if elsewhere."""

    text: str
    name: str
    folder: Path | None


@dataclass(frozen=True)
class Surroundings:
    """What the coordinator knows beside the file."""

    enrolled_agents: int  # that are not banned
    free_bytes: int  # where updates are spooled
    open_names: Mapping[str, str]  # names of runs that are not over -> the run's id
    known_plan: Callable[[str], Plan | None]  # by the start of its id


@dataclass
class CheckedRun:
    """What was found; `config` and `plan` are there when there are no problems."""

    config: RunConfig | None = None
    plan: Plan | None = None
    plan_folder: Path | None = None  # None: the coordinator has the plan already
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(file: RunFile, around: Surroundings) -> CheckedRun:
    """Name every problem of the file and of the plan that it names, whatever else is wrong."""
    found = CheckedRun()
    table = _parse(file, found)
    if table is None:
        return found
    try:
        found.config = parse_run_config(table, (file.folder or Path("/")) / file.name)
    except ConfigError as error:
        found.problems.append(error.problem)
    if isinstance(stated := table.get("plan"), str) and stated and "\0" not in stated:
        _find_plan(stated, file.folder, around, found)
    if found.config is not None:
        found.problems += _population_problems(found.config, around)
        found.warnings += _warnings(found.config, around)
        if found.plan is not None:
            _check_together(found.config, found.plan, around, found)
    return found


def _parse(file: RunFile, found: CheckedRun) -> dict[str, Any] | None:
    size = len(file.text.encode(errors="replace"))
    if size > MAX_FILE_BYTES:
        found.problems.append(f"expected at most {MAX_FILE_BYTES} bytes, found {size}")
        return None
    try:
        return tomllib.loads(file.text)
    except ValueError as error:  # syntax, or a number of too many digits
        found.problems.append(f"is not TOML: {error}")
        return None


def _find_plan(stated: str, base: Path | None, around: Surroundings, found: CheckedRun) -> None:
    folder = Path(stated) if base is None else base / stated
    if not folder.is_dir() and _PLAN_ID.fullmatch(stated):
        found.plan = around.known_plan(stated)
        if found.plan is None:
            found.problems.append(f"plan: expected the id of one known plan, found {stated}")
        return
    if not folder.is_absolute():
        found.problems.append(
            f"plan: expected the id of a plan that the coordinator has (`plan list`), or an "
            f"absolute path on its machine, found {stated!r}"
        )
        return
    try:
        found.plan = load_plan(folder)
        verify_members(found.plan, folder)
    except FedloomError as error:
        found.plan = None
        found.problems.append(f"plan: {folder}: {getattr(error, 'subject', error)}")
    except OSError as error:
        found.plan = None
        found.problems.append(f"plan: {folder} cannot be read: {error.strerror}")
    found.plan_folder = folder


def _population_problems(config: RunConfig, around: Surroundings) -> Iterator[str]:
    stated, enrolled = config.training.population, around.enrolled_agents
    if 0 < stated < enrolled:
        yield (
            f"cohort.population: expected at least the {enrolled} agents that are enrolled, found "
            f"{stated}: any of them may take part, and the strategy's server divides by it"
        )


def _warnings(config: RunConfig, around: Surroundings) -> Iterator[str]:
    if config.cohort.minimum > around.enrolled_agents:
        yield (
            f"cohort.minimum: {config.cohort.minimum} agents are needed, "
            f"{around.enrolled_agents} are enrolled: the run will wait for more (`invite`)"
        )
    if config.buffer > around.enrolled_agents:
        yield (
            f"asynchronous.buffer: {config.buffer} ready agents make a cohort, "
            f"{around.enrolled_agents} are enrolled: each round goes on without more once all who "
            "are here are ready"
        )
    if fewest_agents(config.selection, config.bounds) > max(
        around.enrolled_agents, config.cohort.minimum
    ):
        yield (
            f"selection.most_rounds: {fewest_agents(config.selection, config.bounds)} agents are "
            f"needed so that each round finds cohort.minimum under this cap, "
            f"{around.enrolled_agents} are enrolled: a round may wait in vain"
        )
    if config.training.population > around.enrolled_agents:
        yield (
            f"cohort.population: {config.training.population} agents are stated, "
            f"{around.enrolled_agents} are enrolled: what drift they correct grows that much slower"
        )
    if told := _own_parts(config):
        yield (
            f"training: {told} stays on each agent: a model that the coordinator exports has it as "
            "the plan has it, and only the agents' own models are whole"
        )
    if config.name in around.open_names:
        yield f"name: run {around.open_names[config.name]} of the same name is not over yet"


def _own_parts(config: RunConfig) -> str:
    """Return what of the model is a device's own."""
    parts = ["B"] if config.training.lora is LoraRule.FEDSA else []
    parts += ["the head"] if config.training.personal in (Personal.FEDPER, Personal.FEDREP) else []
    return " and ".join(parts)


def _check_together(config: RunConfig, plan: Plan, around: Surroundings, found: CheckedRun) -> None:
    from coordinator.contexts import encoded_length  # and numpy with it, as `unencodable` does

    if problem := _unmeasured(config, plan):
        found.problems.append(problem)
    try:  # rounds may take turns
        length = max(encoded_length(config, plan, rounds) for rounds in (0, 1))
    except Refused as refused:
        found.problems.append(f"training: {refused.subject}")
        return
    if config.training.strategy is Strategy.FED_MA:
        _check_matching(plan, found)
    if warning := _narrow_clip(config, plan, found.plan_folder):
        found.warnings.append(warning)
    if problem := unencodable(config.encoding, config.training, length):
        found.problems.append(f"this plan cannot be encoded for such a cohort: {problem}")
    if config.gate.bounds_accuracy and isinstance(plan.task, ArrayLearning) and plan.task.values:
        found.problems.append(
            "activation: expected bounds of the loss, because this plan learns values, not labels"
        )
    update = UPDATE_BYTES_PER_VALUE * length + UPDATE_BYTES_MORE
    cohort = min(
        config.buffer or config.cohort.size, max(config.cohort.minimum, around.enrolled_agents)
    )
    least, most = config.cohort.minimum * update, cohort * update
    told = f"{most / 1e6:,.0f} MB for {cohort} updates, {around.free_bytes / 1e6:,.0f} MB are free"
    if around.free_bytes < least:
        found.problems.append(f"the disk of the spool is too full: up to {told}")
    elif around.free_bytes < most:
        found.warnings.append(f"the disk of the spool may become full: up to {told}")


def _narrow_clip(config: RunConfig, plan: Plan, folder: Path | None) -> str:
    """Say where devices of small ranks cannot take the plan's adapter to zero in one round."""
    training, clip = config.training, config.encoding.clip
    if training.lora is not LoraRule.HETLORA or folder is None:
        return ""
    if config.encoding.protection is Protection.PLAIN:
        return ""
    from fedloom.adapters import read_adapter

    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    largest = max(
        float(abs(theta[tensor.offset : tensor.offset + tensor.size]).max())
        for tensor in plan.layout
        if tensor.role in (Role.LORA_A, Role.LORA_B)
    )
    if clip >= largest:
        return ""
    return (
        f"protection.clip: {clip:g} is less than the plan's largest factor, {largest:g}: ranks "
        "that a device does not train go to zero by no more than the clip in a round"
    )


def _check_matching(plan: Plan, found: CheckedRun) -> None:
    from coordinator.plans.permutations import check_permutable  # and ONNX Runtime with it

    try:
        looked = found.plan_folder is not None and check_permutable(plan, found.plan_folder)
    except Refused as refused:
        found.problems.append(f"training.strategy: {refused.subject}")
        return
    if not looked:
        found.warnings.append(
            "training.strategy: the plan's graph could not be run here (which takes its folder, "
            "with infer.onnx, and onnxruntime): that its layers follow one another, with nothing "
            "added or multiplied between them, is taken from names and shapes"
        )


def _unmeasured(config: RunConfig, plan: Plan) -> str:
    metric, known = config.plateau.metric, metrics_of(plan.task)
    if not config.plateau.patience or metric in known:
        return ""
    names = ", ".join(one.value for one in known)
    return f"evaluation.metric: expected one of this plan's, {names}; found {metric.value}"
