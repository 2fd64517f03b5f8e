"""What a run's terms send and keep, of a plan's layout."""

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Role
from fedloom.strategies import (
    fedex_lora,
    fedit,
    fedrep,
    fedsa_lora,
    ffa_lora,
    flexlora,
    flora,
    rolora,
)
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.fedma import matched_parts
from fedloom.strategies.fedper import with_own_head
from fedloom.strategies.parts import Fate, FateOf, Layout, Parts, divide, gathered, scattered
from fedloom.strategies.rule import Memory
from fedloom.strategies.targets import targets_of
from fedloom.terms import LocalTraining, LoraRule, Personal, Strategy

FACTOR_RULES: dict[LoraRule, FactorRule] = {
    rule.lora: rule
    for rule in (
        fedit.RULE,
        ffa_lora.RULE,
        rolora.RULE,
        fedsa_lora.RULE,
        flora.RULE,
        flexlora.RULE,
        fedex_lora.RULE,
    )
}
_FACTORS = (Role.LORA_A, Role.LORA_B)
_OWN_HEAD = (Personal.FEDPER, Personal.FEDREP)


def sends_everything(terms: LocalTraining, layout: Layout = ()) -> bool:
    """Tell whether every update holds all of theta; without a layout, of one without residuals."""
    residual = any(tensor.role is Role.RESIDUAL for tensor in layout)
    matched = terms.strategy is Strategy.FED_MA
    whole = terms.lora is LoraRule.FEDIT and terms.personal not in _OWN_HEAD
    return whole and not residual and not matched


def keeps_own_model(terms: LocalTraining) -> bool:
    """Tell whether a device's model may be another than the global one.

    Then the last vector (P,) of its memory is that model: the parts that it keeps count, or all of
    it with Ditto.
    """
    return terms.lora is LoraRule.FEDSA or terms.personal is not Personal.NONE


def parts_of(terms: LocalTraining, layout: Layout, rounds: int) -> Parts:
    """Return the parts of theta in the round after `rounds` applied ones.

    Raises Refused(PLAN_UNSUPPORTED) for a layout without what the terms train or keep.
    """
    if terms.strategy is Strategy.FED_MA:
        return matched_parts(layout, rounds)
    _check_roles(terms, {tensor.role for tensor in layout})
    if FACTOR_RULES[terms.lora].new_pair is not None:
        targets_of(layout)  # or refuse
    parts = divide(layout, _fate_of(terms), rounds)
    if not parts.shared:
        raise _unsupported("a plan with more than the parts that stay on devices", "no other")
    return parts


def _fate_of(terms: LocalTraining) -> FateOf:
    rule = FACTOR_RULES[terms.lora]

    def fate_of(role: Role, rounds: int) -> Fate:
        if role is Role.RESIDUAL:
            return Fate.MOVED if rule.has_residual else Fate.FIXED
        return rule.fate_of(role, rounds) if role in _FACTORS else Fate.SHARED

    return with_own_head(fate_of) if terms.personal in _OWN_HEAD else fate_of


def _check_roles(terms: LocalTraining, roles: set[Role]) -> None:
    rule = FACTOR_RULES[terms.lora]
    if missing := rule.needs - roles:
        nearest = "ffa" if Role.LORA_B in roles else "fedit"
        plan = "a plan whose A is not frozen"
        if missing == {Role.RESIDUAL}:
            nearest, plan = "flexlora", "a plan built with --residual"
        names = " and ".join(sorted(role.name for role in missing))
        raise _unsupported(
            f"{names} in the plan's layout with lora = {terms.lora.name.lower()!r} ({plan}); "
            f"this plan goes with lora = {nearest!r}",
            "none",
        )
    if terms.personal in _OWN_HEAD and Role.HEAD not in roles:
        raise _unsupported(
            f"a HEAD in the plan's layout with personal = {terms.personal.name.lower()!r}; this "
            "plan goes with personal = 'ditto'",
            "none",
        )


def _unsupported(expected: str, found: str) -> Refused:
    return Refused(Reason.PLAN_UNSUPPORTED, f"expected {expected}, found {found}")


def own_model(terms: LocalTraining, layout: Layout, theta: Theta, memory: Memory) -> Theta:
    """Return the model of a device: the global one where it keeps none of its own."""
    if not keeps_own_model(terms):
        return theta
    if terms.personal is Personal.DITTO:
        return memory[-1]
    return start_of(terms, layout, theta, memory)


def start_of(terms: LocalTraining, layout: Layout, theta: Theta, memory: Memory) -> Theta:
    """Return what a device's update is trained from: theta, with the parts that it keeps."""
    private = parts_of(terms, layout, 0).private
    if not private:
        return theta
    return scattered(theta, private, gathered(memory[-1], private))


def resting(terms: LocalTraining, parts: Parts, step: int) -> tuple[slice, ...]:
    """Return the parts that do not move in a step, from 0, of a round."""
    if terms.personal is Personal.FEDREP:
        return fedrep.resting(parts, terms.head_steps, step)
    return parts.resting
