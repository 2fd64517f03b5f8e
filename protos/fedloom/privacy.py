"""Who learns what from a run: the statement that every command prints, on both sides.

It says what crypto/README.md proves, for the terms of one run; the same terms give the same lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedloom.quality import DEFAULT_EVALUATION, EvaluationTerms, Report
from fedloom.terms import MINIMUM_SUM, Protection, Release, Weighting


@dataclass(frozen=True)
class PrivacyTerms:
    """What the statement follows from."""

    protection: Protection
    release: Release
    minimum: int  # fewest updates in a sum of the run
    authority_is_offline: bool | None = None  # None: not known on this side
    evaluation: EvaluationTerms = DEFAULT_EVALUATION
    groups: int = 0  # sums of a round, each of one group's updates; 0: one of all
    sends_labels: bool = False  # whether an update says how many rows are of each label
    weighting: Weighting = Weighting.SAMPLES
    is_asynchronous: bool = False

    @property
    def weight(self) -> str:
        """What an update counts for, in words."""
        match self.weighting:
            case Weighting.SAMPLES | Weighting.UNIFORM:
                return "number of samples"
            case Weighting.COMPUTE:
                return "number of steps"
            case Weighting.FACTOR_NORM:
                return "adapter's norm"

    @property
    def fewest(self) -> int:
        """Fewest updates that a sum of this run can have: devices insist on some under masks."""
        if self.groups:  # under masks a quorum of each group: crypto/cohort/quorum.py
            quorum = 2 * self.smallest_group // 3 + 1
            return max(MINIMUM_SUM, quorum if self.protection.has_masks else 0)
        return max(self.minimum, MINIMUM_SUM if self.protection.has_masks else 1)

    @property
    def smallest_group(self) -> int:
        """Fewest members of a group, before any of them vanishes."""
        return self.minimum // (self.groups or 1)

    @property
    def sums_are_returned(self) -> bool:
        """Whether agents give the coordinator sums that it cannot open."""
        return self.protection.needs_tenseal and self.release is Release.COORDINATOR


@dataclass(frozen=True)
class PrivacyStatement:
    """What each party can learn."""

    coordinator_reads: str  # in a word, for tables
    coordinator: str
    coordinator_with_agents: str
    agent: str
    network: str
    clear: str
    assumptions: tuple[str, ...]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield (party, what it learns) pairs for printing."""
        yield "coordinator", self.coordinator
        yield "coordinator with agents", self.coordinator_with_agents
        yield "agent", self.agent
        yield "who breaks TLS", self.network
        yield "in clear", self.clear
        for assumption in self.assumptions:
            yield "assuming", assumption


def privacy_statement(terms: PrivacyTerms) -> PrivacyStatement:
    """Return what each party can learn from a run of these terms."""
    return PrivacyStatement(
        coordinator_reads=_coordinator_reads(terms),
        coordinator=_coordinator(terms),
        coordinator_with_agents=_coordinator_with_agents(terms),
        agent=_agent(terms),
        network=(
            "every update"
            if terms.protection is Protection.PLAIN
            else "as much as the coordinator, and no more"
        ),
        clear=_clear(terms),
        assumptions=_assumptions(terms),
    )


def _clear(terms: PrivacyTerms) -> str:
    age = "how many rounds old each update is, " if terms.is_asynchronous else ""
    return (
        f"the coordinator is told who takes part and when, how long training took, {age}each "
        f"agent's {terms.weight} up to a power of two, {_told_quality(terms.evaluation)}, how "
        "long an agent's hours last, unless its policy withholds it its memory, speed, processors "
        "and engine, up to powers of two, and after "
        "each round how many values were clipped, their range for the next one, and the model's "
        "SHA-256; agents see the names in their cohort and the largest "
        f"{terms.weight} up to a power of two"
    )


def _told_quality(evaluation: EvaluationTerms) -> str:
    match evaluation.report:
        case Report.MEAN if evaluation.tell:
            return (
                "the mean quality of the model that a round began with, on held-out data, and the "
                "mean training loss, but no agent's own"
            )
        case Report.EACH:
            return "each agent's training loss and its accuracy and loss on held-out data"
        case Report.MEAN | Report.NONE:
            return "nothing of quality"


def _coordinator_reads(terms: PrivacyTerms) -> str:
    match terms.protection:
        case Protection.PLAIN:
            return "every update"
        case Protection.MASKED:
            return "the sum"
        case Protection.ENCRYPTED | Protection.SEALED:
            return "the sum" if terms.sums_are_returned else "nothing"


def _coordinator(terms: PrivacyTerms) -> str:
    match terms.protection:
        case Protection.PLAIN:
            quality = "its agent's quality, " if _is_summed(terms) else ""
            labels = ", by label where they have one" if terms.sends_labels else ""
            return f"every update, {quality}and its {terms.weight}{labels}"
        case Protection.MASKED:
            return f"{_sum(terms)}, and the total {_total(terms)}"
        case Protection.ENCRYPTED | Protection.SEALED if terms.sums_are_returned:
            made = "what agents make of " if terms.groups else ""
            return f"{made}{_sum(terms)}, and the total {_total(terms)}: agents return them"
        case Protection.ENCRYPTED | Protection.SEALED:
            return "no update, no sum and no model"


def _coordinator_with_agents(terms: PrivacyTerms) -> str:
    match terms.protection:
        case Protection.PLAIN:
            return "every update"
        case Protection.ENCRYPTED:
            return "with one agent: every update, since all agents hold the same key"
        case Protection.MASKED | Protection.SEALED:
            few = tolerated(terms.smallest_group if terms.groups else terms.fewest)
            if terms.groups:
                return (
                    f"with {few} {'agent' if few == 1 else 'agents'} of a group: the sum of the "
                    "others in that group; with more of one group: every update of that group; "
                    "groups are random, but a coordinator can try keys for agents of its own until "
                    "they fall into the group of an agent that it wants"
                )
            return (
                f"with {few} {'agent' if few == 1 else 'agents'} (of a large cohort about a "
                "third): the sum of the others; with more: every update"
            )


def _total(terms: PrivacyTerms) -> str:
    return "norm of the adapters" if terms.weighting is Weighting.FACTOR_NORM else terms.weight


def _agent(terms: PrivacyTerms) -> str:
    known = f"{_sum(terms)}, and the total {_total(terms)}"
    if terms.fewest == 2:
        known += "; in a sum of two, the other's update"
    if terms.protection is not Protection.PLAIN:
        known += "; over all agents, how many values were clipped and how large updates were"
    return known


def _sum(terms: PrivacyTerms) -> str:
    what = "updates and of their agents' quality" if _is_summed(terms) else "updates"
    if terms.groups:
        return (
            f"the means of each round's {what} in {terms.groups} random groups, at least "
            f"{terms.fewest} of them in each group"
        )
    if terms.fewest == 1:
        return f"the mean of each round's {what}, which may be one update alone"
    return f"the mean of each round's {what}, at least {terms.fewest} of them"


def _is_summed(terms: PrivacyTerms) -> bool:
    return terms.evaluation.report is Report.MEAN


def _assumptions(terms: PrivacyTerms) -> tuple[str, ...]:
    if terms.protection is Protection.PLAIN:
        return ()
    made_up = (
        "one of these would get the key of all"
        if terms.protection is Protection.ENCRYPTED
        else "these would count as agents that are with it"
    )
    match terms.authority_is_offline:
        case True:
            return ("the authority's key is offline: the coordinator cannot make up agents",)
        case False:
            return (
                "the coordinator, which holds the authority's key, does not make up agents: "
                f"{made_up}",
            )
        case None:
            return (
                "the coordinator does not hold the authority's key, or does not make up agents "
                f"with it: {made_up}",
            )


def tolerated(minimum: int) -> int:
    """Return how many colluding agents any cohort of at least `minimum` tolerates.

    It is the least of `crypto.cohort.tolerated` from there on, which falls by one at every third
    number. The two packages do not import each other; a test holds them together.
    """
    return min(_tolerated(members) for members in range(minimum, minimum + 3))


def _tolerated(members: int) -> int:
    quorum = 2 * members // 3 + 1 if members > 1 else 1
    threshold = 2 * (members - 1) // 3 + 1
    return max(0, min(2 * quorum - members - 1, threshold - 1))
