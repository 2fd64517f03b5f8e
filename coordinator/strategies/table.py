"""The table of strategies, from the rules themselves and from what terms accept."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from coordinator.asynchronous import TRAINING_KEYS
from coordinator.config import parse_run_config
from coordinator.strategies.compression_table import compression_table
from coordinator.strategies.part_tables import (
    factor_table,
    markdown,
    personal_table,
    robust_table,
)
from fedloom.errors import ConfigError, Refused
from fedloom.strategies import RULES, Rule
from fedloom.terms import (
    ASYNCHRONOUS,
    STRATEGIES_WITH,
    STRATEGY_DEFAULTS,
    LocalTraining,
    Optimizer,
    Protection,
    Release,
    Strategy,
    Weighting,
)

_BEGIN, _END = "<!-- {}: python -m coordinator.strategies -->\n", "<!-- end of {} -->\n"
# Without a LoRA rule's own.
_WEIGHTINGS: list[Weighting] = [one for one in Weighting if one is not Weighting.FACTOR_NORM]
_COLUMNS = (
    "`strategy`",
    "name",
    "paper",
    "an agent gives",
    "values it sends",
    "an agent keeps",
    "the server keeps",
    "`optimizer`",
    "`weighting`",
    "keys of its own (default)",
    "exact under",
)


def with_tables(text: str) -> str:
    """Return the README's text with its tables as the code has them."""
    for name, made in (
        ("table", table),
        ("LoRA rules", factor_table),
        ("personal models", personal_table),
        ("robust rules", robust_table),
        ("compression", compression_table),
    ):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{made()}\n{end}{after}"
    return text


def table() -> str:
    """Return the table as Markdown."""
    return markdown(_COLUMNS, map(_row, RULES.values()))


def _row(rule: Rule) -> Iterator[str]:
    yield f"`{rule.strategy.name.lower()}`"
    yield rule.name
    yield rule.paper
    yield rule.needs
    yield _length(rule)
    yield ", ".join(f"{name} (P)" for name in rule.remembers)
    yield ", ".join(f"{name} (P)" for name in rule.keeps)
    yield _accepted(rule, "optimizer", list(Optimizer))
    yield _accepted(rule, "weighting", _WEIGHTINGS)
    yield ", ".join(_key(rule, name) for name in STRATEGIES_WITH if _is_of(rule, name))
    yield _exactness(rule)


def _length(rule: Rule) -> str:
    vectors = sum(segment.per_parameter for segment in rule.sends)
    numbers = len(rule.sends) - vectors
    told = "P" if vectors == 1 else f"{vectors}P"
    if rule.strategy is Strategy.FED_MA:
        return f"{told} + C"  # one for each of the model's outputs
    return f"{told} + {numbers}" if numbers else told


def _is_of(rule: Rule, name: str) -> bool:
    return rule.strategy in STRATEGIES_WITH[name]


def _key(rule: Rule, name: str) -> str:
    place = "cohort" if name == "population" else "training"
    place = "asynchronous" if name in TRAINING_KEYS else place
    default = STRATEGY_DEFAULTS.get(rule.strategy, {}).get(name)
    if name == "auxiliary_scale":
        return f"`{place}.{name}` (from `local_steps` or `max_steps`)"
    if name == "population":
        return f"`{place}.{name}` (must be stated)"
    return f"`{place}.{name}` ({0.0 if default is None else default:g})"


def _accepted(rule: Rule, field: str, members: list[Optimizer] | list[Weighting]) -> str:
    """Ask the terms themselves what goes together."""
    taken = [member for member in members if _goes_with(rule, {field: member})]
    if len(taken) == len(members):
        return "any"
    return ", ".join(f"`{member.name.lower()}`" for member in taken)


def _goes_with(rule: Rule, choice: dict[str, Optimizer | Weighting]) -> bool:
    least: dict[str, object] = {"server_adaptivity": 1.0, "dynamic_alpha": 1.0}
    least |= {"population": 1, "auxiliary_scale": 1.0, "mixing": 1.0}
    needed = {name: value for name, value in least.items() if _is_of(rule, name)}
    for optimizer, weighting in product(Optimizer, Weighting):
        both = {"optimizer": optimizer, "weighting": weighting, **choice}
        try:
            LocalTraining(strategy=rule.strategy, **needed, **both)  # type: ignore[arg-type]
        except Refused:
            continue
        return True
    return False


def _exactness(rule: Rule) -> str:
    """Ask the run file's checks under what such a run can go."""
    taken = [kind.name.lower() for kind in Protection if _can_run(rule, kind, Release.AGENTS)]
    both = all(_can_run(rule, Protection[kind.upper()], Release.COORDINATOR) for kind in taken)
    protections = "every protection" if len(taken) == len(Protection) else ", ".join(taken)
    return f"{protections}, {'either release' if both else 'release to agents'}"


def _can_run(rule: Rule, protection: Protection, release: Release) -> bool:
    names = [one.name.lower() for one in (rule.strategy, protection, release)]
    for optimizer, weighting in product(Optimizer, Weighting):
        choice = {"optimizer": optimizer.name.lower(), "weighting": weighting.name.lower()}
        run = {
            "plan": "plan",
            "rounds": 1,
            "cohort": {"size": 3} | ({"population": 3} if _is_of(rule, "population") else {}),
            "training": {"strategy": names[0], "max_steps": 1} | choice,
            "protection": {"kind": names[1], "release": names[2], "clip": 1.0},
            "asynchronous": {"buffer": 3} if rule.strategy in ASYNCHRONOUS else {},
        }
        try:
            parse_run_config(run, Path("/run.toml"))
        except ConfigError:
            continue
        return True
    return False
