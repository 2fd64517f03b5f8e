"""HetLoRA: devices of unequal rank against the paper's formulas, written out in float64."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.local_rules import remembered
from edge_agent.ranks import OwnRank
from fedloom.errors import Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies import Layout, algorithm, update_length
from fedloom.strategies.hetlora import factor_norm, tails_of, truncated
from fedloom.strategies.tails import add_penalty, size
from fedloom.terms import (
    FACTOR_NORM_UNIT,
    MAX_WEIGHT_CLASS,
    LocalTraining,
    LoraRule,
    Optimizer,
    Strategy,
    Weighting,
    weight_of,
)
from tests.strategies.federation import (
    Device,
    Float64,
    first_state,
    mean_of,
    move,
    run,
    run_round,
)

# Two products of rank 8, of 5 x 6 and 7 x 4, and a head of 3 values.
R = 8
SHAPES: tuple[tuple[str, tuple[int, ...], Role], ...] = (
    ("a1", (R, 6), Role.LORA_A),
    ("b1", (5, R), Role.LORA_B),
    ("a2", (R, 4), Role.LORA_A),
    ("b2", (7, R), Role.LORA_B),
    ("head", (3,), Role.HEAD),
)
RANKS = (2, 4, 8)
SEEDS = st.integers(0, 2**32 - 1)


def laid_out(shapes: tuple[tuple[str, tuple[int, ...], Role], ...]) -> Layout:
    """Return the layout of these tensors."""
    tensors, offset = [], 0
    for name, shape, role in shapes:
        tensors.append(TrainableTensor(name, shape, offset, role))
        offset += tensors[-1].size
    return tuple(tensors)


LAYOUT = laid_out(SHAPES)
P = LAYOUT[-1].offset + LAYOUT[-1].size


def terms_of(**changes: Any) -> LocalTraining:
    """Return SGD under HetLoRA, weighted as in the paper."""
    values: dict[str, Any] = {
        "lora": LoraRule.HETLORA,
        "optimizer": Optimizer.SGD,
        "weighting": Weighting.FACTOR_NORM,
        "learning_rate": 0.125,
        "local_steps": 3,
    }
    return LocalTraining(**(values | changes))


# the oracle: matrices, one at a time, in float64, with nothing of ours


@dataclass
class Model:
    """The factors of both products, and the head."""

    a: list[Float64]
    b: list[Float64]
    head: Float64

    @classmethod
    def of(cls, theta: Any) -> "Model":
        """Cut a vector by hand."""
        x = np.asarray(theta, np.float64)
        a1, b1, a2, b2, head = np.split(x, np.cumsum([R * 6, 5 * R, R * 4, 7 * R]))
        a, b = [a1.reshape(R, 6), a2.reshape(R, 4)], [b1.reshape(5, R), b2.reshape(7, R)]
        return cls(a, b, head)

    def vector(self) -> Float64:
        """Put it together again."""
        (a1, a2), (b1, b2) = self.a, self.b
        return np.concatenate([a1.ravel(), b1.ravel(), a2.ravel(), b2.ravel(), self.head])

    def upto(self, rank: int) -> "Model":
        """Truncate and pad in one: ranks from `rank` on are zero."""
        kept = np.arange(R) < rank
        a, b = [x * kept[:, None] for x in self.a], [x * kept for x in self.b]
        return Model(a, b, self.head)

    def product_norm(self) -> float:
        """|diag(B_1 A_1, B_2 A_2)|, from the products themselves."""
        squares = [np.sum((b @ a) ** 2) for a, b in zip(self.a, self.b, strict=True)]
        return float(np.sqrt(sum(squares)))

    def tail(self, first: int, last: int) -> float:
        """Sum of |B[:, first:last]| |A[first:last]|."""
        return sum(
            float(np.linalg.norm(b[:, first:last]) * np.linalg.norm(a[first:last]))
            for a, b in zip(self.a, self.b, strict=True)
        )


class HetLora:
    """arXiv:2401.06432, section 3, with devices that descend |theta - centre|^2 / 2."""

    def __init__(self, theta: Any, ranks: list[int], penalty: float, decay: float) -> None:
        self.model, self.ranks = Model.of(theta), list(ranks)
        self.penalty, self.decay = penalty, decay

    def round(self, centres: list[Float64], rate: float, steps: int) -> None:
        locals_ = [self._train(k, centre, rate, steps) for k, centre in enumerate(centres)]
        weights = np.array([local.product_norm() for local in locals_])
        weights = weights / weights.sum()
        mean = sum(p * local.vector() for p, local in zip(weights, locals_, strict=True))
        self.model = Model.of(mean)

    def _train(self, k: int, centre: Float64, rate: float, steps: int) -> Model:
        rank = self.ranks[k]
        first = max(1, int(np.floor(self.decay * rank)))
        start = self.model.upto(rank)
        x = start.vector()
        for _ in range(steps):
            gradient = Model.of(x - centre).upto(rank).vector() + self._slope(x, first, rank)
            x = x - rate * gradient
        end = Model.of(x)
        if self.decay and first < rank and end.tail(first, rank) < start.tail(first, rank):
            self.ranks[k] = first
            return end.upto(first)
        return end

    def _slope(self, x: Float64, first: int, rank: int) -> Float64:
        """d penalty |B| |A|, of each product's ranks from `first` on."""
        found = Model.of(np.zeros(P))
        if not self.penalty or first >= rank:
            return found.vector()
        model = Model.of(x)
        for i in range(2):
            a, b = model.a[i][first:rank], model.b[i][:, first:rank]
            na, nb = np.linalg.norm(a), np.linalg.norm(b)
            if na and nb:
                found.a[i][first:rank] = self.penalty * nb * a / na
                found.b[i][:, first:rank] = self.penalty * na * b / nb
        return found.vector()


def drawn_to(centre: Float64, rank: int) -> Device:
    """Return a device of this rank; a truncated adapter has no gradient beyond it."""

    def gradient(theta: Float64) -> Float64:
        return Model.of(theta - centre).upto(device.rank_now(theta)).vector()

    device = _Ranked(gradient, 1, rank=rank)
    return device


class _Ranked(Device):
    """A device whose gradient is zero where both factors are, as a product's is."""

    @staticmethod
    def rank_now(theta: Float64) -> int:
        model = Model.of(theta)
        used = [i for i in range(R) if any(a[i].any() for a in model.a)]
        return max(used, default=-1) + 1


@given(SEEDS, st.sampled_from([(0.0, 0.0), (0.05, 0.75), (2.0, 0.5)]))
def test_rounds_are_the_papers(seed: int, pruning: tuple[float, float]) -> None:
    penalty, decay = pruning
    random = np.random.default_rng(seed)
    theta = random.standard_normal(P).astype(np.float32)
    centres = [random.standard_normal(P) for _ in RANKS]
    devices: list[Device] = [drawn_to(c, r) for c, r in zip(centres, RANKS, strict=True)]
    terms = terms_of(rank_penalty=penalty, rank_decay=decay)
    state = first_state(terms, theta, devices)
    oracle = HetLora(theta, list(RANKS), penalty, decay)
    for _ in range(3):
        state = run_round(terms, state, devices, 3, LAYOUT)
        oracle.round(centres, 0.125, 3)
        np.testing.assert_allclose(state.theta, oracle.model.vector(), atol=1e-3)
    if decay:
        assert [int(device.memory[0][0]) for device in devices] == oracle.ranks


@given(SEEDS)
def test_the_mean_of_movements_is_the_mean_of_padded_adapters(seed: int) -> None:
    """The law of the module's docstring, for any strategy's weights: sum p (pad - t) + t."""
    random = np.random.default_rng(seed)
    theta = random.standard_normal(P).astype(np.float32)
    devices: list[Device] = [drawn_to(random.standard_normal(P), rank) for rank in RANKS]
    terms = terms_of()
    state = first_state(terms, theta, devices)
    sent = [move(device, state, terms, LAYOUT) for device in devices]
    padded = [theta.astype(np.float64) + one.values for one in sent]
    for one, rank in zip(padded, RANKS, strict=True):
        np.testing.assert_allclose(one, Model.of(one).upto(rank).vector(), atol=1e-6)
    weights = np.array([one.weight for one in sent], np.float64)
    expected = sum(w * x for w, x in zip(weights / weights.sum(), padded, strict=True))
    after = algorithm(terms, LAYOUT).apply(state, mean_of(sent), len(sent))
    np.testing.assert_allclose(after.theta, expected, atol=1e-5)


@given(SEEDS, st.integers(1, R))
def test_truncation_and_norm_are_those_of_the_matrices(seed: int, rank: int) -> None:
    theta = np.random.default_rng(seed).standard_normal(P).astype(np.float32)
    found = truncated(LAYOUT, theta, rank)
    np.testing.assert_array_equal(found, Model.of(theta).upto(rank).vector())
    expected = Model.of(theta).upto(rank).product_norm()
    assert factor_norm(LAYOUT, found) == pytest.approx(expected, rel=1e-9)


@given(st.floats(2.0**-10, 256))
def test_a_weight_is_a_norm_within_its_stated_error(norm: float) -> None:
    weight = weight_of(terms_of(), 7, norm)
    assert abs(weight * FACTOR_NORM_UNIT - norm) <= 2.0**-17


def test_weights_stay_within_their_class() -> None:
    assert weight_of(terms_of(), 7, 0.0) == 1
    assert weight_of(terms_of(), 7, 1e9) == 1 << MAX_WEIGHT_CLASS


@given(SEEDS)
def test_the_penalty_has_the_gradient_of_what_it_penalises(seed: int) -> None:
    """Against central differences, in a random direction."""
    random = np.random.default_rng(seed)
    theta, direction = (random.standard_normal(P).astype(np.float32) for _ in range(2))
    tails, h = tails_of(LAYOUT, 8, 0.5), np.float32(2.0**-7)
    gradient = np.zeros(P, np.float32)
    add_penalty(gradient, theta, tails, 0.5)
    ends = [size(tails, theta + sign * h * direction) for sign in (1, -1)]
    slope = 0.5 * (ends[0] - ends[1]) / (2 * float(h))
    assert float(gradient @ direction) == pytest.approx(slope, rel=1e-2, abs=1e-2)


def test_a_tail_of_zeros_has_no_penalty() -> None:
    """B begins with zero, where its norm has no gradient."""
    gradient = np.zeros(P, np.float32)
    theta = Model.of(np.ones(P))
    theta.b = [np.zeros_like(b) for b in theta.b]
    add_penalty(gradient, theta.vector().astype(np.float32), tails_of(LAYOUT, 8, 0.5), 1.0)
    assert not gradient.any()


# ranks


def test_a_device_never_has_more_than_the_plans_rank_nor_grows_again() -> None:
    pruning = terms_of(rank_penalty=0.1, rank_decay=0.5)
    assert [OwnRank.of(terms_of(), LAYOUT, stated, ()).rank for stated in (0, 3, 99)] == [8, 3, 8]
    kept = (np.array([2], np.float32),)
    assert [OwnRank.of(pruning, LAYOUT, stated, kept).rank for stated in (0, 1, 4)] == [2, 1, 2]
    assert OwnRank.of(pruning, LAYOUT, 4, (np.zeros(1, np.float32),)).rank == 4
    assert tails_of(LAYOUT, 1, 0.5) == ()
    assert (remembered(terms_of()), remembered(pruning)) == (0, 1)


def test_self_pruning_shrinks_to_what_the_data_has() -> None:
    """A matrix of rank 1 on every device: whatever is beyond the first ranks goes away."""
    random = np.random.default_rng(3)
    target = np.outer(random.standard_normal(5), random.standard_normal(6)) / 2
    devices = [factorisation(target, rank) for rank in (4, 8)]
    terms = terms_of(rank_penalty=0.3, rank_decay=0.5, local_steps=10)
    theta = run(terms, start(), devices, 60, None, ONE)
    assert [int(device.memory[0][0]) for device in devices] == [1, 1]
    assert np.abs(product(theta) - target).max() < 0.05


# LoRA itself: |B A - M|^2 / 2, whose truncated factors have no gradient of their own accord

ONE = laid_out(SHAPES[:2])


def factorisation(target: Float64, rank: int) -> Device:
    """Return a device that fits a 5 x 6 matrix."""

    def gradient(theta: Float64) -> Float64:
        a, b = theta[: R * 6].reshape(R, 6), theta[R * 6 :].reshape(5, R)
        error = b @ a - target
        return np.concatenate([(b.T @ error).ravel(), (error @ a.T).ravel()])

    return Device(gradient, 1, rank=rank)


def start() -> Any:
    """Return A as drawn and B of zeros."""
    theta = np.zeros(R * 11, np.float32)
    theta[: R * 6] = np.random.default_rng(6).standard_normal(R * 6) / 2
    return theta


def product(theta: Any) -> Any:
    """Return B A."""
    return theta[R * 6 :].reshape(5, R) @ theta[: R * 6].reshape(R, 6)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_a_truncated_adapter_stays_so_while_it_is_trained(optimizer: Optimizer) -> None:
    """The law that spares a mask: no gradient, momentum or decay moves what both factors lack."""
    random = np.random.default_rng(4)
    device = factorisation(random.standard_normal((5, 6)), 3)
    more = {"momentum": 0.5} if optimizer is Optimizer.SGD else {}
    terms = terms_of(optimizer=optimizer, weight_decay=0.1, local_steps=6, **more)
    state = first_state(terms, start(), [device])
    sent = move(device, state, terms, ONE)
    padded = state.theta + sent.values
    a, b = padded[: R * 6].reshape(R, 6), padded[R * 6 :].reshape(5, R)
    assert not a[3:].any()
    assert not b[:, 3:].any()
    assert a[:3].any()
    assert b[:, :3].all()


def test_unequal_ranks_find_what_the_largest_alone_could() -> None:
    """With A fixed nothing is convex in both; the known optimum is a matrix of rank 2 itself."""
    random = np.random.default_rng(8)
    target = random.standard_normal((5, 2)) @ random.standard_normal((2, 6)) / 4
    devices = [factorisation(target + d, rank) for d, rank in ((-0.05, 2), (0.0, 4), (0.05, 8))]
    theta = run(terms_of(local_steps=10), start(), devices, 200, None, ONE)
    assert np.abs(product(theta) - target).max() < 0.05


@pytest.mark.parametrize("strategy", [Strategy.FED_PROX, Strategy.FED_AVG_M, Strategy.FED_ADAM])
def test_strategies_of_movements_go_with_it(strategy: Strategy) -> None:
    adam = {"server_adaptivity": 1e-3, "server_learning_rate": 0.05}
    more: dict[str, Any] = adam if strategy is Strategy.FED_ADAM else {}
    terms = terms_of(strategy=strategy, **more)
    random = np.random.default_rng(9)
    target = random.standard_normal((5, 6))
    before = np.linalg.norm(product(start()) - target)
    theta = run(terms, start(), [factorisation(target, r) for r in RANKS], 60, None, ONE)
    assert np.linalg.norm(product(theta) - target) < before / 2


def test_an_update_tells_no_rank_by_its_length() -> None:
    assert update_length(terms_of(), LAYOUT) == P


def begin(layout: Layout) -> None:
    """Do what a run does first with a layout."""
    algorithm(terms_of(), layout)
    truncated(layout, np.zeros(layout[-1].offset + layout[-1].size, np.float32), 2)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (SHAPES[1:2], "LORA_A in the plan's layout"),
        (SHAPES[:2] + SHAPES[2:3], "each have a LORA_B"),
        ((SHAPES[0], ("b1", (5, 4), Role.LORA_B)), "each have a LORA_B"),
    ],
)
def test_a_layout_without_pairs_is_refused(
    shapes: tuple[tuple[str, tuple[int, ...], Role], ...], expected: str
) -> None:
    layout = laid_out(shapes)
    with pytest.raises(Refused, match=expected):
        begin(layout)


def test_terms_that_prune_need_both_keys() -> None:
    for change in ({"rank_decay": 0.5}, {"rank_penalty": 0.5}):
        with pytest.raises(Refused, match="both above 0, or neither"):
            terms_of(**change)
    with pytest.raises(Refused, match="rank_decay in"):
        terms_of(rank_penalty=0.5, rank_decay=1.0)
    with pytest.raises(Refused, match="unless lora is HETLORA"):
        replace(
            terms_of(rank_penalty=0.5, rank_decay=0.5),
            lora=LoraRule.FEDIT,
            weighting=Weighting.SAMPLES,
        )


@given(SEEDS)
def test_at_one_rank_and_equal_weights_it_is_fedit(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.standard_normal((5, 6))
    terms = terms_of(weighting=Weighting.UNIFORM)
    ends = [
        run(one, start(), [factorisation(target + d, R) for d in (-1, 0, 1)], 3, None, ONE)
        for one in (terms, replace(terms, lora=LoraRule.FEDIT))
    ]
    np.testing.assert_allclose(*ends, atol=1e-5)
