"""Rules across groups: each against its paper in float64, and against groups that are anything."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crypto.groups import MINIMUM_GROUP, draw
from fedloom.errors import Refused
from fedloom.strategies import algorithm
from fedloom.strategies.grouped import combined
from fedloom.terms import (
    MINIMUM_SUM,
    MOVEMENTS,
    GroupRule,
    LocalTraining,
    Strategy,
)
from tests.strategies.federation import (
    Device,
    Float32,
    Float64,
    first_state,
    layout_of,
    mean_of,
    move,
)
from tests.strategies.samples import terms_of

_TINY = 2.0**-125  # below it, values are zero
_values = st.floats(-10, 10, width=32)
_HUGE = float(np.float32(3e38))
_anything = st.floats(-_HUGE, _HUGE, width=32) | st.sampled_from([_HUGE, -_HUGE]) | _values
_few = settings(max_examples=40)
_matrices = st.tuples(st.integers(3, 9), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=_values)
)


def terms_with(rule: GroupRule, groups: int, trim: float = 0.0, **changes: Any) -> LocalTraining:
    """Return FedAvg's terms with groups."""
    trim = (trim or 1.001 / groups) if rule is GroupRule.TRIMMED_MEAN else 0.0
    return LocalTraining(groups=groups, group_rule=rule, group_trim=trim, **changes)


def across(rule: GroupRule, x: Float32, trim: float = 0.0) -> Float64:
    """Combine (G, U) means."""
    return combined(terms_with(rule, len(x), trim), list(x)).astype(np.float64)


def median(x: Float64) -> Float64:
    """Yin et al., Definition 1."""
    result = []
    for column in x.T:
        ordered, middle = sorted(column.tolist()), len(column) // 2
        odd = len(column) % 2
        result.append(ordered[middle] if odd else (ordered[middle - 1] + ordered[middle]) / 2)
    return np.array(result)


def weiszfeld(x: Float64, iterations: int = 32) -> Float64:
    """Pillutla et al., Algorithm 2, from the median, without an early end."""
    z = median(x)
    for _ in range(iterations):
        beta = [1 / max(1e-6, float(np.linalg.norm(z - x_g))) for x_g in x]
        z = sum(b * x_g for b, x_g in zip(beta, x, strict=True)) / sum(beta)
    return z


@_few
@given(_matrices)
def test_the_median_is_the_papers(x: Float32) -> None:
    expected = median(x.astype(np.float64))
    np.testing.assert_allclose(across(GroupRule.MEDIAN, x), expected, rtol=1e-6, atol=_TINY)


@_few
@given(_matrices, st.floats(0.0, 0.49))
def test_the_trimmed_mean_is_the_papers(x: Float32, trim: float) -> None:
    trim = max(trim, 1.001 / len(x))
    b = math.floor(trim * len(x))
    columns = (sorted(column)[b : len(x) - b] for column in x.astype(np.float64).T.tolist())
    expected = [np.mean(column) for column in columns]
    found = across(GroupRule.TRIMMED_MEAN, x, trim)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@_few
@given(_matrices)
def test_the_geometric_median_is_the_papers(x: Float32) -> None:
    """Within a hundredth of the sum of distances from any mean, and of the paper's iterations."""

    def objective(z: Float64) -> float:
        return sum(float(np.linalg.norm(z - x_g)) for x_g in x.astype(np.float64))

    found = objective(across(GroupRule.GEOMETRIC_MEDIAN, x))
    expected = objective(weiszfeld(x.astype(np.float64)))
    least = min(expected, *map(objective, x.astype(np.float64)))
    assert found <= least * 1.01 + 1e-4


@pytest.mark.parametrize("rule", GroupRule)
@_few
@given(_matrices)
def test_equal_means_give_that_mean_and_no_other_bits(rule: GroupRule, x: Float32) -> None:
    """As with one group, where the mean of all is what the strategy's server is given."""
    x[:] = x[0]
    np.testing.assert_allclose(across(rule, x), x[0], rtol=1e-6, atol=_TINY)


@pytest.mark.parametrize("rule", [GroupRule.MEDIAN, GroupRule.TRIMMED_MEAN])
@_few
@given(_matrices, st.randoms(use_true_random=False))
def test_the_number_of_a_group_does_not_matter(rule: GroupRule, x: Float32, random: Any) -> None:
    order = list(range(len(x)))
    random.shuffle(order)
    np.testing.assert_allclose(across(rule, x), across(rule, x[order]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", GroupRule)
@_few
@given(st.data())
def test_fewer_than_half_of_the_groups_do_not_decide(rule: GroupRule, data: st.DataObject) -> None:
    """Between the others value by value; the geometric median near them (Pillutla et al., with q
    of the groups anything, within 2 (1-q)/(1-2q) radii of a ball that holds the others)."""
    x = data.draw(_matrices)
    most = 1 if rule is GroupRule.TRIMMED_MEAN else (len(x) - 1) // 2
    bad = data.draw(st.lists(st.integers(0, len(x) - 1), unique=True, max_size=most))
    for group in bad:
        x[group] = data.draw(hnp.arrays(np.float32, x.shape[1], elements=_anything))
    found, good = across(rule, x), np.delete(x, bad, axis=0).astype(np.float64)
    if rule is GroupRule.GEOMETRIC_MEDIAN:
        q, centre = len(bad) / len(x), good.mean(axis=0)
        radius = max(float(np.linalg.norm(one - centre)) for one in good)
        assert np.linalg.norm(found - centre) <= 2 * (1 - q) / (1 - 2 * q) * radius * 1.2 + 1e-3
    else:
        assert (found >= good.min(axis=0) - 1e-6 * abs(good).max() - _TINY).all()
        assert (found <= good.max(axis=0) + 1e-6 * abs(good).max() + _TINY).all()


def test_one_in_each_of_half_of_the_groups_decides() -> None:
    """What is not promised; it shows that these tests could fail."""
    x = np.ones((4, 3), np.float32)
    x[:2] = 1e9
    assert across(GroupRule.MEDIAN, x)[0] > 1e8


@pytest.mark.parametrize("rule", GroupRule)
def test_bits_do_not_depend_on_how_a_machine_takes_small_numbers(rule: GroupRule) -> None:
    """Numbers below the smallest normal one count as zeros, and none of them comes out."""
    x = np.random.default_rng(3).standard_normal((5, 40_000)).astype(np.float32)
    x[:, ::7] *= np.float32(2.0**-120)
    x[:, ::5] = np.float32(1e-40)
    zeroed = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)
    found = across(rule, x).astype(np.float32)
    assert found.tobytes() == across(rule, zeroed).astype(np.float32).tobytes()
    small = found[np.abs(found) < 2.0**-126]
    assert not small.any()
    assert not np.signbit(small).any()


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(9, 40), st.integers(3, 5))
def test_groups_are_balanced_and_follow_from_the_seed(seed: bytes, members: int, g: int) -> None:
    group_of = draw(seed, members, g)
    sizes = [group_of.count(group) for group in range(g)]
    assert max(sizes) - min(sizes) <= 1
    assert group_of == draw(seed, members, g)
    assert draw(seed, members, 1) == (0,) * members


def test_who_is_with_whom_is_random() -> None:
    """Of 12 in 4 groups, two share one with a chance of 2/11, whoever they are."""
    together = np.zeros((12, 12))
    for number in range(2000):
        group_of = np.array(draw(number.to_bytes(32, "big"), 12, 4))
        together += group_of[:, None] == group_of[None]
    shares = together[np.triu_indices(12, 1)] / 2000
    assert np.abs(shares - 2 / 11).max() < 0.045  # five standard deviations


@pytest.mark.parametrize("rule", GroupRule)
def test_convex_problems_reach_their_optimum_beside_a_hostile_device(rule: GroupRule) -> None:
    """Twelve devices of one quadratic each, nearly alike; one sends what it likes."""
    random = np.random.default_rng(5)
    optimum = random.standard_normal(6)
    own = [optimum + 0.05 * random.standard_normal(6) for _ in range(12)]
    terms = terms_with(rule, 4, epochs=1, local_steps=5, learning_rate=0.05)
    devices = [Device(lambda x, o=o: x - o, 8) for o in own]  # type: ignore[misc]
    state = first_state(terms, np.zeros(6, np.float32), devices)
    run = algorithm(terms, layout_of(state.theta))
    for number in range(60):
        sent = [move(device, state, terms, layout_of(state.theta)) for device in devices]
        sent[7].values[:] = 1e6 * random.standard_normal(6)
        group_of = draw(bytes([number]) * 32, 12, 4)
        means = [
            mean_of([one for one, found in zip(sent, group_of, strict=True) if found == group])
            for group in range(4)
        ]
        state = run.apply(state, combined(terms, means), 12)
    assert np.abs(state.theta - optimum).max() < 0.15
    assert np.abs(optimum).max() > 0.5


@pytest.mark.parametrize("strategy", Strategy)
def test_groups_go_with_movements_alone(strategy: Strategy) -> None:
    assert terms_of(strategy).groups == 0
    if strategy in MOVEMENTS:
        assert LocalTraining.from_message(terms_of(strategy, groups=3).to_message()).groups == 3
    else:
        with pytest.raises(Refused, match="groups 0 with this strategy"):
            terms_of(strategy, groups=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 1},
        {"groups": 2},
        {"groups": 101},
        {"groups": 4, "group_trim": 0.3},
        {"groups": 4, "group_rule": GroupRule.TRIMMED_MEAN},
        {"groups": 4, "group_rule": GroupRule.TRIMMED_MEAN, "group_trim": 0.5},
        {"group_trim": 0.3},
    ],
)
def test_terms_of_groups_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="group"):
        LocalTraining(**wrong)


def test_the_least_group_is_the_least_sum() -> None:
    """The two packages do not import each other."""
    assert MINIMUM_GROUP == MINIMUM_SUM
