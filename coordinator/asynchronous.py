"""Asynchronous runs: `[asynchronous]` of a run file, checked against the run.

    synchronous    a round's cohort is whom it invited: all, or a quorum, or who is ready in time
    asynchronous   everybody here is invited to every round; its cohort is whoever is ready first,
                   `buffer` of them, whichever round they began to train in

Nothing else differs: protections, sums and what agents apply stay as they are. The rest of the
table goes to the agents as it is (`LocalTraining`), because each of them weighs its own update.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from coordinator.selection import UNIFORM, Selection
from fedloom.terms import ASYNCHRONOUS, STRATEGY_DEFAULTS, StalenessWeighting, Strategy

# Keys of [asynchronous] that are fields of LocalTraining, and what its defaults are there.
TRAINING_KEYS = (
    "max_staleness",
    "staleness_weighting",
    "staleness_exponent",
    "staleness_threshold",
    "mixing",
)


def defaults(strategy: Strategy, weighting: StalenessWeighting) -> Mapping[str, Any]:
    """Return what a run file that does not say these keys means."""
    values = dict(STRATEGY_DEFAULTS.get(strategy, {}))
    if weighting is StalenessWeighting.CONSTANT:
        values["staleness_exponent"] = 0.0
    return values


def problems(
    buffer: int, strategy: Strategy, quorum: int, minimum: int, size: int
) -> Iterator[str]:
    """Say what keeps the run from being as asynchronous as it says, with what works instead."""
    name, is_asynchronous = strategy.name.lower(), strategy in ASYNCHRONOUS
    if buffer and not is_asynchronous:
        yield (
            f'asynchronous.buffer: expected 0 with training.strategy = "{name}", whose server '
            'takes no update from an older state; use "fed_buff" or "fed_async", or leave '
            "[asynchronous] out"
        )
    if is_asynchronous and not buffer:
        yield (
            f"asynchronous.buffer: expected how many ready agents make a cohort, because "
            f'training.strategy = "{name}" is asynchronous, found 0; the nearest that is not is '
            '"fed_avg"'
        )
    if buffer and not minimum <= buffer <= size:
        yield (
            f"asynchronous.buffer: expected cohort.minimum = {minimum} .. cohort.size = {size}, "
            f"found {buffer}"
        )
    if buffer and quorum:
        yield (
            "cohort.quorum: expected 0 with [asynchronous], whose buffer closes a cohort, found "
            f"{quorum}"
        )


def selection_problems(buffer: int, selection: Selection) -> Iterator[str]:
    """Say what of `[selection]` chooses among agents, where each of them is wanted."""
    if not buffer:
        return
    for name, found, only in (
        ("rule", f'"{selection.rule.value}"', f'"{UNIFORM.rule.value}"'),
        ("over_selection", f"{selection.over_selection:g}", f"{UNIFORM.over_selection:g}"),
        ("most_rounds", str(selection.most_rounds), str(UNIFORM.most_rounds)),
    ):
        if found != only:
            yield (
                f"selection.{name}: expected {only} with [asynchronous], which invites everybody "
                f"who is here and suits, and goes on with who is ready first; found {found}"
            )
