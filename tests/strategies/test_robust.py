"""Robust rules: each against its paper in float64, and against updates that may be anything."""

import io
import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import crypto
from coordinator.aggregation import DEFAULTS, MEAN, Aggregation, Rule
from coordinator.strategies.robust import RULES
from coordinator.strategies.robust import updates as updates_module
from coordinator.strategies.robust.total import RobustTotal
from crypto import plain
from fedloom.strategies import algorithm
from fedloom.terms import Encoding, Protection, Strategy
from tests.strategies.federation import Device, Float32, Float64, first_state, layout_of, move
from tests.strategies.samples import terms_of

NUMBERS: dict[Rule, dict[str, Any]] = {
    Rule.TRIMMED_MEAN: {"trim": 0.2},
    Rule.KRUM: {"faulty": 1},
    Rule.MULTI_KRUM: {"faulty": 1},
    Rule.NORM_BOUND: {"bound": 1.0},
}
ROBUST = [rule for rule in Rule if rule is not Rule.MEAN]
CAP = 1 << 10


def aggregation_of(rule: Rule, **changes: Any) -> Aggregation:
    """Return a rule with no more numbers than it needs."""
    return Aggregation(rule, **(DEFAULTS.get(rule, {}) | NUMBERS.get(rule, {}) | changes))


def combine(
    aggregation: Aggregation,
    updates: Any,
    weights: list[int] | None = None,
    slots: list[int] | None = None,
    tail: int = 0,
) -> crypto.OpenedSum:
    """Let agents encode, the coordinator combine, and an agent open: (K, P) float32 in."""
    updates = np.asarray(updates, np.float32)
    count, length = updates.shape
    context = crypto.UpdateContext(bytes(16), 1, 1, length, 1000, CAP, 1.0, tail_length=tail)
    with TemporaryDirectory() as name:
        total = RobustTotal(
            context,
            aggregation,
            lambda slot: Path(name) / str(slot),
        )
        for slot, update in zip(slots or range(count), updates, strict=True):
            encoder = plain.encoder(context, slot, None, np.random.default_rng())
            weight = 1 if weights is None else weights[slot]
            data = b"".join(encoder.encode(update, weight))
            assert len(data) == total.encoded_update_size
            (Path(name) / str(slot)).write_bytes(data)
            total.add(slot, io.BytesIO(data))
        encoded = b"".join(total.result())
    assert len(encoded) == total.encoded_sum_size
    return plain.open_sum(context, None, total.members, io.BytesIO(encoded))


# oracles, from the papers' formulas


def median(x: Float64, a: Aggregation, p: Float64) -> Float64:
    """Yin et al., Definition 1."""
    del a, p
    result = []
    for column in x.T:
        ordered, middle = sorted(column.tolist()), len(column) // 2
        odd = len(column) % 2
        result.append(ordered[middle] if odd else (ordered[middle - 1] + ordered[middle]) / 2)
    return np.array(result)


def trimmed_mean(x: Float64, a: Aggregation, p: Float64) -> Float64:
    """Yin et al., Definition 2."""
    del p
    b = math.floor(round(a.trim * len(x), 9))
    return np.array([np.mean(sorted(column.tolist())[b : len(x) - b]) for column in x.T])


def krum_scores(x: Float64, f: int) -> list[float]:
    """Blanchard et al., the Krum function."""
    n, scores = len(x), []
    for i in range(n):
        distances = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    return scores


def krum(x: Float64, a: Aggregation, p: Float64) -> Float64:
    """The one of least score."""
    del p
    scores = krum_scores(x, a.faulty)
    return x[scores.index(min(scores))]


def multi_krum(x: Float64, a: Aggregation, p: Float64) -> Float64:
    """The mean of the m of least score."""
    del p
    scores = krum_scores(x, a.faulty)
    m = a.selected or len(x) - a.faulty - 2
    return np.mean([x[i] for i in sorted(range(len(x)), key=scores.__getitem__)[:m]], axis=0)


def norm_bound(x: Float64, a: Aggregation, p: Float64) -> Float64:
    """Sun et al.: each over max(1, |x| / M)."""
    return sum(p_k * x_k / max(1, np.linalg.norm(x_k) / a.bound) for p_k, x_k in zip(p, x))  # type: ignore[return-value]  # noqa: B905


ORACLES = {
    Rule.MEDIAN: median,
    Rule.TRIMMED_MEAN: trimmed_mean,
    Rule.KRUM: krum,
    Rule.MULTI_KRUM: multi_krum,
    Rule.NORM_BOUND: norm_bound,
}
_values = st.floats(-10, 10, width=32)
_matrices = st.tuples(st.integers(5, 12), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=_values)
)
_weights = st.lists(st.integers(1, CAP), min_size=12, max_size=12)


@pytest.mark.parametrize("rule", ORACLES)
@given(_matrices, _weights)
def test_it_is_the_papers(rule: Rule, x: Float32, weights: list[int]) -> None:
    aggregation, exact = aggregation_of(rule), x.astype(np.float64)
    if rule in (Rule.KRUM, Rule.MULTI_KRUM):  # whose choice between equal scores is rounding's
        scores = sorted(krum_scores(exact, 1))
        if min(np.diff(scores), default=1.0) < 1e-6 * (1 + scores[-1]):
            return
    shares = np.array(weights[: len(x)]) / sum(weights[: len(x)])
    opened = combine(aggregation, x, weights)
    expected = ORACLES[rule](exact, aggregation, shares)
    np.testing.assert_allclose(opened.mean, expected, rtol=1e-6, atol=1e-6)
    assert opened.total_weight == sum(weights[: len(x)])


def objective(z: Any, x: Float64, alpha: Float64) -> float:
    """What the geometric median minimises."""
    return float(sum(a * np.linalg.norm(z - x_k) for a, x_k in zip(alpha, x, strict=True)))


@given(_matrices, _weights)
def test_the_geometric_median_minimises_the_sum_of_distances(
    x: Float32, weights: list[int]
) -> None:
    """Its objective is convex: no worse than at the updates, at their mean, and close by."""
    exact, alpha = x.astype(np.float64), np.array(weights[: len(x)]) / sum(weights[: len(x)])
    found = combine(aggregation_of(Rule.GEOMETRIC_MEDIAN, iterations=500), x, weights).mean
    least = objective(found.astype(np.float64), exact, alpha)
    others = [*exact, alpha @ exact]
    random = np.random.default_rng(0)
    others += [found + 0.05 * random.standard_normal(x.shape[1]) for _ in range(20)]
    assert least <= min(objective(other, exact, alpha) for other in others) * (1 + 2e-3) + 1e-4


def test_the_geometric_median_of_a_triangle_is_fermats_point() -> None:
    """Seen from it, the corners are 120 degrees apart."""
    x = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    z = combine(aggregation_of(Rule.GEOMETRIC_MEDIAN, iterations=500), x).mean.astype(np.float64)
    directions = [(corner - z) / np.linalg.norm(corner - z) for corner in x]
    for one, other in itertools.combinations(directions, 2):
        assert one @ other == pytest.approx(-0.5, abs=1e-4)


@pytest.mark.parametrize("rule", ROBUST)
@given(_matrices, st.randoms(use_true_random=False), _weights)
def test_the_order_of_updates_does_not_matter(
    rule: Rule, x: Float32, random: Any, weights: list[int]
) -> None:
    """In which they arrive, not a bit; to which slots they belong, no more than rounding."""
    slots = list(range(len(x)))
    random.shuffle(slots)
    arrived = combine(aggregation_of(rule), x[slots], weights, slots)
    in_order = combine(aggregation_of(rule), x, weights)
    assert arrived.mean.tobytes() == in_order.mean.tobytes()


@pytest.mark.parametrize("rule", ROBUST)
@given(_matrices)
def test_equal_updates_give_that_update(rule: Rule, x: Float32) -> None:
    x[:] = x[0]
    aggregation = aggregation_of(rule, bound=1e3) if rule is Rule.NORM_BOUND else None
    found = combine(aggregation or aggregation_of(rule), x).mean
    np.testing.assert_allclose(found, x[0], rtol=1e-6, atol=1e-6)


# updates that may be anything

_HUGE = float(np.float32(3e38))
_anything = st.floats(-_HUGE, _HUGE, width=32) | st.sampled_from([_HUGE, -_HUGE, 0.0]) | _values


@st.composite
def attacks(draw: st.DrawFn, rule: Rule) -> tuple[Float32, list[int], list[int], Aggregation]:
    """Return updates, the slots of those that are faulty, weights, and a rule that withstands."""
    count, length = draw(st.integers(7, 12)), draw(st.integers(1, 6))
    most = (count - 1) // 2
    changes: dict[str, Any] = {}
    if rule is Rule.TRIMMED_MEAN:
        changes["trim"] = draw(st.floats(1 / count, 0.49))
        most = math.floor(changes["trim"] * count)
    if rule in (Rule.KRUM, Rule.MULTI_KRUM):
        most = changes["faulty"] = (count - 3) // 2
    x = draw(hnp.arrays(np.float32, (count, length), elements=_values))
    faulty = draw(st.lists(st.integers(0, count - 1), unique=True, max_size=most))
    for slot in faulty:
        x[slot] = draw(hnp.arrays(np.float32, length, elements=_anything))
    weights = draw(st.lists(st.integers(1, CAP), min_size=count, max_size=count))
    return x, faulty, weights, aggregation_of(rule, **changes)


@pytest.mark.parametrize("rule", [Rule.MEDIAN, Rule.TRIMMED_MEAN])
@given(st.data())
def test_fewer_than_the_breakdown_point_move_no_value_beyond_the_honest_ones(
    rule: Rule, data: st.DataObject
) -> None:
    x, faulty, weights, aggregation = data.draw(attacks(rule))
    found = combine(aggregation, x, weights).mean
    honest = np.delete(x, faulty, axis=0)
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


@given(st.data())
def test_krum_is_never_far_from_the_honest(data: st.DataObject) -> None:
    """What is chosen has n - f - 2 neighbours, one of them honest, no further off in sum than an
    honest one's: within sqrt(n - f - 2) diameters of the honest, whatever was sent."""
    x, faulty, weights, aggregation = data.draw(attacks(Rule.KRUM))
    found = combine(aggregation, x, weights).mean.astype(np.float64)
    honest = np.delete(x, faulty, axis=0).astype(np.float64)
    diameter = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    nearest = min(float(np.linalg.norm(found - one)) for one in honest)
    neighbours = len(x) - aggregation.faulty - 2
    assert nearest <= math.sqrt(neighbours) * diameter * (1 + 1e-6) + 1e-6
    assert any(np.array_equal(found, one) for one in x.astype(np.float64))


@pytest.mark.parametrize("rule", [Rule.KRUM, Rule.MULTI_KRUM])
@given(st.data())
def test_krum_leaves_out_what_is_far_from_everybody(rule: Rule, data: st.DataObject) -> None:
    x, faulty, weights, aggregation = data.draw(attacks(rule))
    for number, slot in enumerate(faulty):
        x[slot] = 1e6 * (number + 1)  # away from all others, and from each other
    found = combine(aggregation, x, weights).mean
    honest = np.delete(x, faulty, axis=0)
    assert (found >= honest.min(axis=0) - 1e-5).all()
    assert (found <= honest.max(axis=0) + 1e-5).all()


@settings(max_examples=60)
@given(st.data())
def test_the_geometric_median_stays_near_the_honest(data: st.DataObject) -> None:
    """Pillutla et al.: with q < 1/2 of the weight corrupted, z is within 2 (1-q)/(1-2q)
    radii of any point, of a ball about it that holds all that is honest."""
    x, faulty, _, _ = data.draw(attacks(Rule.GEOMETRIC_MEDIAN))
    aggregation = aggregation_of(Rule.GEOMETRIC_MEDIAN, iterations=1000)
    found = combine(aggregation, x).mean.astype(np.float64)
    honest = np.delete(x, faulty, axis=0).astype(np.float64)
    centre, q = honest.mean(axis=0), len(faulty) / len(x)
    radius = max(float(np.linalg.norm(one - centre)) for one in honest)
    assert np.linalg.norm(found - centre) <= 2 * (1 - q) / (1 - 2 * q) * radius * 1.01 + 1e-3


@given(st.data())
def test_a_bounded_norm_bounds_what_one_update_does(data: st.DataObject) -> None:
    x, faulty, weights, aggregation = data.draw(attacks(Rule.NORM_BOUND))
    found = combine(aggregation, x, weights).mean.astype(np.float64)
    without = x.copy()
    without[faulty] = 0
    clean = combine(aggregation, without, weights).mean.astype(np.float64)
    share = sum(weights[slot] for slot in faulty) / sum(weights)
    assert np.linalg.norm(found) <= aggregation.bound * (1 + 1e-6)
    assert np.linalg.norm(found - clean) <= share * aggregation.bound + 1e-6


def test_the_mean_withstands_not_even_one() -> None:
    """What the others are for; it shows that these tests could fail."""
    x = np.ones((9, 3), np.float32)
    x[4] = 1e9
    assert mean_of_matrix(x)[0] > 1e8
    for rule in ROBUST:
        assert np.abs(combine(aggregation_of(rule, **NUMBERS.get(rule, {})), x).mean).max() < 2


def mean_of_matrix(x: Float32) -> Float64:
    """Return the plain mean."""
    mean: Float64 = x.astype(np.float64).mean(axis=0)
    return mean


# blocks, the rest, the bytes


@pytest.mark.parametrize("rule", ROBUST)
def test_blocks_change_nothing(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that sees a few columns at once makes of them what it makes of all."""
    x = np.random.default_rng(1).standard_normal((8, 1000)).astype(np.float32)
    whole = combine(aggregation_of(rule), x).mean
    monkeypatch.setattr(updates_module, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(updates_module, "_LEAST_COLUMNS", 7)
    np.testing.assert_allclose(combine(aggregation_of(rule), x).mean, whole, rtol=0, atol=5e-7)


def test_memory_does_not_grow_with_the_updates() -> None:
    """A block of a thousand updates has fewer columns, and no more values."""
    sizes = []
    with TemporaryDirectory() as name:
        path = Path(name) / "update"
        path.write_bytes(bytes(plain.encoded_size(replace_length(1 << 18))))
        for count in (1, 10, 1000):
            updates = updates_module.Updates([path] * count, [1] * count, slice(0, 1 << 18))
            sizes.append(max(block.nbytes for block in itertools.islice(updates.blocks(), 2)))
    assert max(sizes) <= 16 << 20


def replace_length(length: int) -> crypto.UpdateContext:
    """Return a context of that many values."""
    return crypto.UpdateContext(bytes(16), 1, 1, length, 1000, CAP, 1.0)


@pytest.mark.parametrize("rule", ROBUST)
def test_what_follows_the_movement_is_averaged_as_ever(rule: Rule) -> None:
    x = np.random.default_rng(2).standard_normal((8, 50)).astype(np.float32)
    weights = [1, 2, 3, 4, 5, 6, 7, 8]
    found = combine(aggregation_of(rule), x, weights, tail=10).mean
    alone = combine(aggregation_of(rule), x[:, :40], weights).mean
    np.testing.assert_array_equal(found[:40], alone)
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(found[40:], shares @ x[:, 40:].astype(np.float64), rtol=1e-6)


# whole runs


@pytest.mark.parametrize("rule", [rule for rule in ROBUST if rule is not Rule.NORM_BOUND])
def test_a_convex_problem_is_solved_although_two_of_nine_lie(rule: Rule) -> None:
    """|theta - centre|^2 / 2 on each device, the honest ones' centres about 1; the mean fails."""
    random = np.random.default_rng(3)
    centres = [1 + 0.05 * random.standard_normal(5) for _ in range(9)]
    devices = [Device(lambda w, c=centre: w - c, 1) for centre in centres]  # type: ignore[misc]
    terms = terms_of(Strategy.FED_AVG, learning_rate=0.1, local_steps=5)
    numbers = {"faulty": 2} if "KRUM" in rule.name else {"trim": 0.25}
    changes = numbers if rule in NUMBERS else {}
    ends = {}
    for aggregation in (MEAN, aggregation_of(rule, **changes)):
        state = first_state(terms, np.zeros(5, np.float32), devices)
        layout = layout_of(state.theta)
        for _ in range(40):
            sent = [move(device, state, terms, layout).values for device in devices]
            sent[2], sent[7] = -100 * sent[2], sent[7] + np.float32(50)
            if aggregation.is_mean:
                mean = np.asarray(mean_of_matrix(np.stack(sent)), np.float32)
            else:
                mean = combine(aggregation, np.stack(sent)).mean
            state = algorithm(terms).apply(state, mean, len(sent))
        ends[aggregation.rule] = float(np.abs(state.theta - 1).max())
    assert ends[rule] < 0.15
    assert ends[Rule.MEAN] > 1


# what goes with what


def problems_of(
    aggregation: Aggregation,
    protection: Protection = Protection.PLAIN,
    strategy: Strategy = Strategy.FED_AVG,
    minimum: int = 9,
) -> list[str]:
    """Return what keeps a rule from a run."""
    encoding = Encoding(protection, clip=1.0)
    return list(aggregation.problems(encoding, terms_of(strategy), minimum))


@pytest.mark.parametrize("rule", ROBUST)
def test_every_rule_goes_with_plain_updates(rule: Rule) -> None:
    assert rule in RULES
    for strategy in (Strategy.FED_AVG, Strategy.FED_PROX, Strategy.FED_ADAM):
        assert problems_of(aggregation_of(rule), strategy=strategy) == []


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("protection", [p for p in Protection if p is not Protection.PLAIN])
def test_no_rule_goes_where_updates_are_hidden(rule: Rule, protection: Protection) -> None:
    (problem,) = problems_of(aggregation_of(rule), protection)
    assert "reads every update" in problem
    assert 'protection.kind = "plain"' in problem
    assert 'aggregation.rule = "mean"' in problem


@pytest.mark.parametrize("strategy", [Strategy.FED_NOVA, Strategy.SCAFFOLD, Strategy.FED_DYN])
def test_no_rule_goes_with_servers_that_count_every_update(strategy: Strategy) -> None:
    (problem,) = problems_of(aggregation_of(Rule.MEDIAN), strategy=strategy)
    assert 'training.strategy = "fed_avg"' in problem


@pytest.mark.parametrize(
    ("aggregation", "minimum", "told"),
    [
        (Aggregation(Rule.KRUM, faulty=1), 4, "cohort.minimum above 2 faulty + 2"),
        (Aggregation(Rule.KRUM), 9, "expected at least 1"),
        (Aggregation(Rule.MULTI_KRUM, faulty=2, selected=6), 9, "faulty - 2 = 5, found 6"),
        (Aggregation(Rule.TRIMMED_MEAN, trim=0.1), 9, "at least 1/cohort.minimum"),
        (Aggregation(Rule.TRIMMED_MEAN, trim=0.5), 9, "below 0.5"),
        (Aggregation(Rule.NORM_BOUND), 9, "largest L2 norm"),
        (Aggregation(Rule.GEOMETRIC_MEDIAN), 9, "iterations in 1..1000"),
        (Aggregation(Rule.MEDIAN, trim=0.1), 9, 'unless aggregation.rule is "trimmed_mean"'),
        (Aggregation(Rule.NORM_BOUND, bound=math.inf), 9, "a finite number"),
        (Aggregation(faulty=-1), 9, "at least 0"),
    ],
)
def test_numbers_that_make_no_rule_are_refused(
    aggregation: Aggregation, minimum: int, told: str
) -> None:
    problems = problems_of(aggregation, minimum=minimum)
    assert any(told in problem for problem in problems), problems
