"""The tables of what travels, what stays and what withstands, from the rules themselves."""

from collections.abc import Iterable, Iterator

from coordinator.aggregation import DEFAULTS, OWNERS, Aggregation, Rule
from coordinator.strategies.robust import RULES
from fedloom.errors import Refused
from fedloom.plans import Role
from fedloom.strategies import personal
from fedloom.strategies.parts import Fate
from fedloom.strategies.portions import FACTOR_RULES
from fedloom.terms import NEEDS_FACTORS, Encoding, LocalTraining, LoraRule, Personal, Protection

_FACTORS = {Role.LORA_A: "A", Role.LORA_B: "B"}
_RESIDUAL = {Role.RESIDUAL: "residual (`plan build --residual`)"}


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    head = tuple(columns)
    lines = [head, ("---",) * len(head), *(tuple(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def factor_table() -> str:
    """Return the table of LoRA rules."""
    columns = ("`lora`", "name", "paper", "odd rounds send", "even rounds send", "stays on devices")
    mean = "mean of products B A"
    more = ("rests", mean, "goes with `personal`", "needs a plan with", "protections")
    return markdown((*columns, *more), map(_factors, FACTOR_RULES))


def _factors(lora: LoraRule) -> Iterator[str]:
    rule = FACTOR_RULES[lora]
    turns = [{role: rule.fate_of(role, rounds) for role in _FACTORS} for rounds in (0, 1)]
    yield f"`{lora.name.lower()}`"
    yield rule.name
    yield rule.paper
    for turn in turns:
        yield _named(turn, Fate.SHARED)
    yield _named(turns[0], Fate.PRIVATE)
    resting = [_named(turn, Fate.FROZEN) for turn in turns]
    yield resting[0] if resting[0] == resting[1] else " then ".join(resting)
    yield rule.mean
    yield ", ".join(f"`{one.name.lower()}`" for one in Personal if _goes_with(lora, one))
    yield ", ".join(name for role, name in (_FACTORS | _RESIDUAL).items() if role in rule.needs)
    yield "any" if lora not in NEEDS_FACTORS else "plain"


def _named(fates: dict[Role, Fate], fate: Fate) -> str:
    return ", ".join(name for role, name in _FACTORS.items() if fates[role] is fate)


def _goes_with(lora: LoraRule, kind: Personal) -> bool:
    """Ask the terms themselves."""
    needed = personal.RULES[kind].least
    try:
        LocalTraining(lora=lora, personal=kind, **needed)  # type: ignore[arg-type]
    except Refused:
        return False
    return True


def personal_table() -> str:
    """Return the table of models of a device's own."""
    columns = ("`personal`", "name", "paper", "a device's own", "trained", "keys of its own")
    return markdown(columns, map(_personal, personal.RULES.values()))


def _personal(rule: personal.PersonalRule) -> Iterator[str]:
    yield f"`{rule.personal.name.lower()}`"
    yield rule.name
    yield rule.paper
    yield rule.own
    yield rule.trained
    yield ", ".join(f"`training.{key}`" for key in rule.least)


def robust_table() -> str:
    """Return the table of rules that make one update of many."""
    columns = ("`aggregation.rule`", "name", "paper", "faulty updates of n that it withstands")
    more = ("weights count", "updates are read", "keys of its own (default)", "protections")
    mean = ("`mean`", "weighted mean", "arXiv:1602.05629v4, Algorithm 1", "none", "yes", "once")
    rows = [(*mean, "", "any"), *(tuple(_robust(rule)) for rule in RULES)]
    return markdown((*columns, *more), rows)


def _robust(kind: Rule) -> Iterator[str]:
    rule = RULES[kind]
    yield f"`{kind.name.lower()}`"
    yield rule.name
    yield rule.paper
    yield rule.withstands
    yield "yes" if rule.weighs else "no"
    yield rule.reads
    keys = [key for key, owners in OWNERS.items() if kind in owners]
    yield ", ".join(f"`aggregation.{key}` ({DEFAULTS.get(kind, {}).get(key, 0):g})" for key in keys)
    alone = ", ".join(one.name.lower() for one in Protection if _can_run(kind, one))
    grouped = all(_can_run(kind, one, groups=4) for one in Protection)
    yield f"{alone}; any with `groups`" if grouped else alone


def _can_run(kind: Rule, protection: Protection, groups: int = 1) -> bool:
    needed = {"trim": 0.25, "faulty": 1, "selected": 0, "bound": 1.0}
    owned = {key: value for key, value in needed.items() if kind in OWNERS[key]}
    numbers = DEFAULTS.get(kind, {}) | owned
    aggregation = Aggregation(kind, **numbers, groups=groups)  # type: ignore[arg-type]
    return not list(aggregation.problems(Encoding(protection), LocalTraining(), 12))
