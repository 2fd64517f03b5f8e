"""Who is invited to a round: pure functions of what a run remembers, and of a draw that is fixed.

What an agent asks for comes first (its hours), then what the run asks for (memory, speed, engine),
then fairness (a cap on rounds in a window); of those who are left a sample is drawn. Devices tell
what they have when they connect, as in the step "Resource Request" of FedCS (Nishio and Yonetani,
arXiv:1804.08333v2). FedCS then takes the fastest first, and so the same ones for ever. Here rule
"capability" draws with the weights by which Oort discounts slow clients (Lai et al.,
arXiv:2010.06081v3, equation (1), without its statistical utility, which is a device's loss and not
the coordinator's to know): 1 for an agent that is expected to be done within T, `round_seconds`,
and (T/t)^2 for one that needs t > T. A device of which nothing is known counts as fast, so that it
is tried. Every weight is above 0: nobody is left out for good. The draw without replacement is by
keys log(u) / w (Efraimidis and Spirakis, arXiv:1012.0256, algorithm A-Res).

Over-selection: more agents are invited than a round needs, and those who are ready first make its
cohort. Bonawitz et al. invite 130 % (arXiv:1902.01046v2, section 9).
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum

SLOWNESS_EXPONENT = 2.0  # alpha of Oort's equation (1)
MAX_OVER_SELECTION = 10.0
MAX_RESERVE = 100.0
ENGINES = ("", "onnx", "torch")
MAX_WINDOW = 1000  # rounds; a run remembers whom it invited in each
_ROUNDING = 1e-9  # 1.1 * 10 is a little more than 11


class SelectionRule(Enum):
    """Who is drawn of those who may be."""

    UNIFORM = "uniform"  # anybody
    AVAILABLE = "available"  # whose hours leave time for a round; of these anybody
    CAPABILITY = "capability"  # the same, slower ones more rarely


class Pacing(Enum):
    """What agents are told that are not needed now."""

    STEERED = "steered"  # surplus agents leave, and come back spread over time
    NONE = "none"  # everybody stays connected


@dataclass(frozen=True)
class Traits:
    """What an agent says of itself; 0 and empty: not told. It is believed."""

    memory_bytes: int = 0
    samples_per_second: float = 0.0
    training_seconds: float = 0.0  # of its last local training
    processors: int = 0
    engines: tuple[str, ...] = ()
    available_until: float = 0.0  # on the run's clock; 0: no end is known


UNKNOWN = Traits()


@dataclass(frozen=True)
class Selection:
    """`[selection]` of run.toml."""

    rule: SelectionRule = SelectionRule.UNIFORM
    over_selection: float = 1.0  # invitations for each place in a cohort
    most_rounds: int = 0  # that an agent is invited to in `window` rounds in a row; 0: any
    window: int = 0
    round_seconds: float = 0.0  # that an agent should need at most, T; 0: not known
    least_memory_mb: int = 0  # 10^6 bytes
    least_samples_per_second: float = 0.0
    engine: str = ""  # that an agent must have; "": any
    pacing: Pacing = Pacing.STEERED
    reserve: float = 1.0  # agents kept for the next round, for each one that a round invites

    def invitations(self, places: int) -> int:
        """Return how many agents are invited for so many places."""
        return math.ceil(self.over_selection * places - _ROUNDING)

    def within(self, training_seconds: float) -> "Selection":
        """Return the same where T, if not stated, is the time that a round gives to training."""
        return self if self.round_seconds else replace(self, round_seconds=training_seconds)

    @property
    def has_cut_off(self) -> bool:
        """Whether more agents are invited than have a place."""
        return self.over_selection > 1


UNIFORM = Selection()


@dataclass(frozen=True)
class Bounds:
    """What of a run file a selection must agree with."""

    minimum: int
    places: int
    population: int  # 0: not stated
    capacity: int  # most agents that any round may invite
    training_seconds: float


def problems(selection: Selection, bounds: Bounds) -> Iterator[str]:
    """Yield what is wrong with `[selection]`, and the nearest that works."""
    yield from _out_of_range(selection, bounds)
    cap, window = selection.most_rounds, selection.window
    if (cap or window) and not 0 < cap < window <= MAX_WINDOW:
        yield (
            "selection.most_rounds: expected 0 < most_rounds < window <= "
            f"{MAX_WINDOW}, found {cap} and window = {window}; without a cap leave both out"
        )
    elif cap and 0 < bounds.population < fewest_agents(selection, bounds):
        yield (
            f"cohort.population: expected at least {fewest_agents(selection, bounds)} under "
            f"selection.most_rounds = {cap} of {window}, or a round may find fewer than "
            f"cohort.minimum, found {bounds.population}"
        )
    if selection.rule is SelectionRule.UNIFORM and selection.round_seconds:
        yield (
            'selection.round_seconds: expected with rule = "available" or "capability", found '
            '"uniform", which asks nobody for time'
        )


def fewest_agents(selection: Selection, bounds: Bounds) -> int:
    """Return how many agents there must be, so that every round finds `minimum` under the cap.

    The rounds of a window before the last fill (window - 1) * invitations places; that many divided
    by the cap is how many agents may be out for the last one.
    """
    if not selection.most_rounds:
        return bounds.minimum
    invited = (selection.window - 1) * selection.invitations(bounds.places)
    return bounds.minimum + invited // selection.most_rounds


def _out_of_range(selection: Selection, bounds: Bounds) -> Iterator[str]:
    ranges = {
        "over_selection": (1.0, MAX_OVER_SELECTION),
        "round_seconds": (0.0, bounds.training_seconds),
        "least_memory_mb": (0, 1 << 30),
        "least_samples_per_second": (0.0, 1e9),
        "reserve": (0.0, MAX_RESERVE),
    }
    for name, (least, most) in ranges.items():
        found = getattr(selection, name)
        if not least <= found <= most:  # nor NaN
            yield f"selection.{name}: expected {least:g}..{most:g}, found {found:g}"
    if selection.engine not in ENGINES:
        yield f"selection.engine: expected one of {list(ENGINES)}, found {selection.engine!r}"
    within = 1 <= selection.over_selection <= MAX_OVER_SELECTION
    places = min(bounds.places, bounds.capacity + 1)  # as large as a run file likes
    if within and places * selection.over_selection > bounds.capacity:
        yield (
            f"selection.over_selection: expected at most {bounds.capacity / places:g}, by "
            f"which a round invites {bounds.capacity} agents, found {selection.over_selection:g}"
        )


Recent = Sequence[Set[str]]  # whom each of the last finished rounds invited, oldest first


def eligible(
    selection: Selection, agents: Set[str], traits: Mapping[str, Traits], recent: Recent, now: float
) -> frozenset[str]:
    """Return those of `agents` that may be invited now."""
    tired = _tired(selection, agents, recent)
    return frozenset(
        agent
        for agent in agents
        if agent not in tired and _suits(selection, traits.get(agent, UNKNOWN), now)
    )


def _suits(selection: Selection, said: Traits, now: float) -> bool:
    least = selection.least_memory_mb * 10**6
    if said.memory_bytes < least or said.samples_per_second < selection.least_samples_per_second:
        return False
    if selection.engine and selection.engine not in said.engines:
        return False
    if not said.available_until:
        return True
    needed = 0.0
    if selection.rule is not SelectionRule.UNIFORM:
        needed = said.training_seconds or selection.round_seconds
    return said.available_until > now + needed


def _tired(selection: Selection, agents: Set[str], recent: Recent) -> frozenset[str]:
    """Return who has been invited as often as the cap allows."""
    if not selection.most_rounds:
        return frozenset()
    rounds = recent[max(0, len(recent) - (selection.window - 1)) :]
    return frozenset(
        agent
        for agent in agents
        if sum(agent in invited for invited in rounds) >= selection.most_rounds
    )


def last_rounds(selection: Selection, recent: Recent) -> tuple[frozenset[str], ...]:
    """Return what of `recent` is looked at again: the last round, and the cap's window."""
    count = max(1, selection.window - 1)
    return tuple(frozenset(invited) for invited in recent[max(0, len(recent) - count) :])


def choose(
    selection: Selection, agents: Set[str], traits: Mapping[str, Traits], places: int, draw: str
) -> frozenset[str]:
    """Return whom of the eligible `agents` to invite for so many places; `draw` fixes it."""
    count = selection.invitations(places)
    if selection.rule is not SelectionRule.CAPABILITY:
        return select(agents, count, draw)
    if len(agents) <= count:
        return frozenset(agents)
    chance = random.Random(draw)  # noqa: S311 - fairness, not secrecy
    keys = {
        agent: math.log(1.0 - chance.random()) / weight(selection, traits.get(agent, UNKNOWN))
        for agent in sorted(agents)
    }
    return frozenset(sorted(keys, key=lambda agent: -keys[agent])[:count])


def weight(selection: Selection, said: Traits) -> float:
    """Return how often an agent is drawn beside one that is fast enough, 0 excluded to 1."""
    seconds, preferred = said.training_seconds, selection.round_seconds
    if not preferred or seconds <= preferred:
        return 1.0
    return float((preferred / seconds) ** SLOWNESS_EXPONENT)


def select(candidates: Set[str], count: int, draw: str) -> frozenset[str]:
    """Return a uniform random sample of at most `count` candidates; `draw` names and fixes it."""
    if len(candidates) <= count:
        return frozenset(candidates)
    chooser = random.Random(draw)  # noqa: S311 - fairness, not secrecy
    return frozenset(chooser.sample(sorted(candidates), count))
