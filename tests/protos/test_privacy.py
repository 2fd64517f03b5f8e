"""The privacy statement: what it says follows from the run's terms, and never flatters them."""

import itertools
from dataclasses import replace

import pytest

from crypto import cohort
from crypto.groups import draw
from fedloom.privacy import PrivacyStatement, PrivacyTerms, privacy_statement, tolerated
from fedloom.quality import EvaluationTerms, Report
from fedloom.terms import MINIMUM_SUM, Protection, Release, Weighting

ALL = [
    PrivacyTerms(*terms)
    for terms in itertools.product(Protection, Release, (1, 2, 3, 7, 100), (None, False, True))
]


def statement(protection: Protection, release: Release, minimum: int = 3) -> PrivacyStatement:
    """Return the statement of a run."""
    return privacy_statement(PrivacyTerms(protection, release, minimum))


@pytest.mark.parametrize(
    ("protection", "release", "reads"),
    [
        (Protection.PLAIN, Release.AGENTS, "every update"),
        (Protection.PLAIN, Release.COORDINATOR, "every update"),
        (Protection.MASKED, Release.AGENTS, "the sum"),
        (Protection.MASKED, Release.COORDINATOR, "the sum"),
        (Protection.ENCRYPTED, Release.AGENTS, "nothing"),
        (Protection.ENCRYPTED, Release.COORDINATOR, "the sum"),
        (Protection.SEALED, Release.AGENTS, "nothing"),
        (Protection.SEALED, Release.COORDINATOR, "the sum"),
    ],
)
def test_what_the_coordinator_reads(protection: Protection, release: Release, reads: str) -> None:
    found = statement(protection, release)
    assert found.coordinator_reads == reads
    assert ("no sum" in found.coordinator) == (reads == "nothing")
    assert ("agents return" in found.coordinator) == (
        reads == "the sum" and protection is not Protection.MASKED
    )


@pytest.mark.parametrize("protection", Protection)
def test_groups_are_told_to_whoever_opens_them(protection: Protection) -> None:
    terms = PrivacyTerms(protection, Release.COORDINATOR, 12, groups=4)
    assert terms.fewest == MINIMUM_SUM
    found = privacy_statement(terms)
    means = "in 4 random groups, at least 3 of them in each group"
    assert means in found.agent
    assert (means in found.coordinator) == (protection is not Protection.PLAIN)
    assert found.coordinator.startswith("what agents make of") == protection.needs_tenseal
    if protection.has_masks:
        assert "with 1 agent of a group: the sum of the others in that group" in (
            found.coordinator_with_agents
        )


def test_labels_are_told_where_updates_say_them() -> None:
    told = [
        privacy_statement(PrivacyTerms(Protection.PLAIN, Release.AGENTS, 3, sends_labels=labels))
        for labels in (False, True)
    ]
    assert ["by label" in statement.coordinator for statement in told] == [False, True]


def test_larger_groups_are_told_as_the_protocol_holds_them() -> None:
    """The smallest group of any cohort, a quorum of it, and who may collude in it."""
    for minimum, groups in itertools.product(range(9, 90), (3, 4, 7)):
        if minimum < 3 * groups:
            continue
        terms = PrivacyTerms(Protection.SEALED, Release.AGENTS, minimum, groups=groups)
        sizes = [draw(bytes(32), n, groups) for n in range(minimum, minimum + 3 * groups)]
        least = [min(map(group_of.count, range(groups))) for group_of in sizes]
        assert terms.fewest == min(map(cohort.quorum, least))
        told = privacy_statement(terms).coordinator_with_agents
        assert told.startswith(f"with {min(map(cohort.tolerated, least))} agent")


@pytest.mark.parametrize("protection", Protection)
def test_what_is_told_of_weights_is_what_they_are(protection: Protection) -> None:
    for weighting, word in (
        (Weighting.SAMPLES, "number of samples"),
        (Weighting.COMPUTE, "number of steps"),
        (Weighting.FACTOR_NORM, "norm"),
    ):
        terms = PrivacyTerms(protection, Release.COORDINATOR, 3, weighting=weighting)
        found = privacy_statement(terms)
        for told in (found.coordinator, found.agent, found.clear):
            assert word in told
            assert ("number of samples" in told) == (weighting is Weighting.SAMPLES)


@pytest.mark.parametrize("terms", ALL, ids=str)
def test_equal_terms_give_equal_lines_that_can_be_printed(terms: PrivacyTerms) -> None:
    lines = list(privacy_statement(terms).lines())
    again = PrivacyTerms(terms.protection, terms.release, terms.minimum, terms.authority_is_offline)
    assert lines == list(privacy_statement(again).lines())
    parties = [party for party, _ in lines]
    assert parties[:5] == [
        "coordinator",
        "coordinator with agents",
        "agent",
        "who breaks TLS",
        "in clear",
    ]
    for party, learns in lines:
        assert party.isprintable()
        assert learns.isprintable()
        assert learns[0].islower()
        assert not learns.endswith(".")


@pytest.mark.parametrize("terms", ALL, ids=str)
def test_a_stronger_protection_never_reads_more(terms: PrivacyTerms) -> None:
    amounts = ["nothing", "the sum", "every update"]
    ours = amounts.index(privacy_statement(terms).coordinator_reads)
    for kind in Protection:
        if kind > terms.protection:
            stronger = privacy_statement(PrivacyTerms(kind, terms.release, terms.minimum))
            assert amounts.index(stronger.coordinator_reads) <= ours


@pytest.mark.parametrize("minimum", range(1, 120))
def test_as_many_colluding_agents_are_named_as_the_cohorts_protocol_tolerates(
    minimum: int,
) -> None:
    assert tolerated(minimum) == min(cohort.tolerated(n) for n in range(minimum, minimum + 200))
    few = tolerated(max(minimum, MINIMUM_SUM))
    for kind in (Protection.MASKED, Protection.SEALED):
        said = statement(kind, Release.AGENTS, minimum).coordinator_with_agents
        assert said.startswith(f"with {few} agent")
        assert "the sum of the others; with more: every update" in said


def test_one_shared_key_is_called_what_it_is() -> None:
    for release in Release:
        said = statement(Protection.ENCRYPTED, release).coordinator_with_agents
        assert said.startswith("with one agent: every update")


@pytest.mark.parametrize("protection", Protection)
def test_a_sum_that_may_be_of_one_or_two_is_called_what_it_is(protection: Protection) -> None:
    one, two = (statement(protection, Release.COORDINATOR, n) for n in (1, 2))
    if protection.has_masks:
        assert f"at least {MINIMUM_SUM} of them" in one.agent
        assert one == two
    else:
        assert "may be one update alone" in one.agent
        assert "in a sum of two, the other's update" in two.agent
        assert protection is Protection.PLAIN or "may be one update alone" in one.coordinator


@pytest.mark.parametrize("protection", [kind for kind in Protection if kind.has_run_key])
def test_who_can_make_up_agents_is_said(protection: Protection) -> None:
    said = {
        offline: privacy_statement(PrivacyTerms(protection, Release.AGENTS, 3, offline)).assumptions
        for offline in (True, False, None)
    }
    assert said[True] == ("the authority's key is offline: the coordinator cannot make up agents",)
    for other in (False, None):
        assert "make up agents" in said[other][0]
        assert said[other] != said[True]
    assert said[False] != said[None]


@pytest.mark.parametrize("protection", Protection)
def test_who_learns_quality_follows_from_how_it_is_reported(protection: Protection) -> None:
    mean, silent, each, none = (
        privacy_statement(PrivacyTerms(protection, Release.AGENTS, 5, evaluation=terms))
        for terms in (
            EvaluationTerms(),
            EvaluationTerms(tell=False),
            EvaluationTerms(Report.EACH),
            EvaluationTerms(Report.NONE),
        )
    )
    assert "mean quality" in mean.clear
    assert "each agent's training loss and its accuracy" in each.clear
    assert "nothing of quality" in silent.clear
    assert "nothing of quality" in none.clear
    for said, is_summed in ((mean, True), (silent, True), (each, False), (none, False)):
        assert ("quality" in said.agent) == is_summed
        reads = protection in (Protection.PLAIN, Protection.MASKED)
        assert ("quality" in said.coordinator) == (is_summed and reads)


def test_the_age_of_updates_is_said_where_they_have_one() -> None:
    terms = PrivacyTerms(Protection.SEALED, Release.AGENTS, 3)
    told = "how many rounds old each update is"
    assert told in privacy_statement(replace(terms, is_asynchronous=True)).clear
    assert told not in privacy_statement(terms).clear
