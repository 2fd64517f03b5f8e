"""Rules that take every device's factors, against their papers in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crypto
from coordinator.aggregation import Aggregation
from coordinator.aggregation import Rule as AggregationRule
from coordinator.strategies.factored_total import FactoredTotal, FactorRound
from crypto import plain
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan, PlanOrigin, Role
from fedloom.strategies import Layout, ServerState, algorithm, moved_length, update_length
from fedloom.strategies.factors import TrainedPairs
from fedloom.strategies.flexlora import nearest_pair
from fedloom.strategies.portions import FACTOR_RULES, parts_of
from fedloom.strategies.products import FactorServer, Updates
from fedloom.strategies.targets import targets_of
from fedloom.tasks import TextClassification
from fedloom.terms import (
    NEEDS_FACTORS,
    Encoding,
    LocalTraining,
    LoraRule,
    Optimizer,
    Personal,
    Protection,
    Strategy,
)
from tests.strategies.federation import Device, Float32, Float64, move
from tests.strategies.test_parts import SHAPES, laid_out

RESIDUALS = (("w1", (3, 4), Role.RESIDUAL), ("w2", (3, 4), Role.RESIDUAL))
LAYOUT = laid_out((*SHAPES, *RESIDUALS))
P = LAYOUT[-1].offset + LAYOUT[-1].size
ALPHA, RANK = 6.0, 2
SCALE = ALPHA / RANK
HEAD = slice(28, 33)
WITH_RESIDUAL = (LoraRule.FEDEX, LoraRule.FLORA)


def pairs_of(count: int, shape: tuple[int, int], rank: int, seed: int) -> list[Any]:
    """Draw p_k, B_k and A_k of so many devices."""
    random = np.random.default_rng(seed)
    shares = random.integers(1, 9, count)
    out, columns = shape
    return [
        (
            share / shares.sum(),
            random.standard_normal((out, rank)),
            random.standard_normal((rank, columns)),
        )
        for share in shares
    ]


def trained(pairs: Sequence[Any]) -> TrainedPairs:
    """Return the factors as a rule is given them."""
    return TrainedPairs(
        np.array([p for p, _, _ in pairs]), lambda k: (pairs[k][1], pairs[k][2]), (1,)
    )


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


# FlexLoRA


@given(st.integers(1, 6), shapes, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_flexlora_gives_the_nearest_product_of_its_rank(
    count: int, shape: tuple[int, int], rank: int, seed: int
) -> None:
    """Eckart and Young: what is left has the other singular values, whichever way it is found."""
    pairs = pairs_of(count, shape, rank, seed)
    whole = sum(p * b @ a for p, b, a in pairs)
    b, a = nearest_pair(trained(pairs))
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    values = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(whole - b @ a), np.linalg.norm(values[rank:]), atol=1e-9
    )
    for lower in range(1, rank):  # the first ones are the nearest of a lower rank
        left = np.linalg.norm(whole - b[:, :lower] @ a[:lower])
        np.testing.assert_allclose(left, np.linalg.norm(values[lower:]), atol=1e-9)


def test_flexlora_leaves_no_direction_without_a_gradient() -> None:
    """B = 0 in the first round leaves products of 0: A must not become 0 with them."""
    pairs = [(0.5, np.zeros((6, 2)), np.ones((2, 5))), (0.5, np.zeros((6, 2)), np.ones((2, 5)))]
    b, a = nearest_pair(trained(pairs))
    assert not b.any()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1)


def test_flexlora_takes_factors_of_lower_ranks_padded_with_zeros() -> None:
    pairs = pairs_of(3, (8, 7), 4, 11)
    for rank, (_, b, a) in zip((1, 2, 4), pairs, strict=True):
        b[:, rank:], a[rank:] = 0, 0
    whole = sum(p * b @ a for p, b, a in pairs)
    b, a = nearest_pair(trained(pairs))
    left = np.linalg.svd(whole, compute_uv=False)[4:]
    np.testing.assert_allclose(np.linalg.norm(whole - b @ a), np.linalg.norm(left), atol=1e-9)


# whole rounds


@dataclass
class Cohort:
    """K updates of a layout, with the model that they began from."""

    theta: Float32
    updates: Float32  # (K, U)
    weights: list[int]

    @property
    def shares(self) -> Float64:
        """p_k."""
        return np.array(self.weights) / sum(self.weights)


def cohort_of(count: int, seed: int, layout: Layout = LAYOUT) -> Cohort:
    """Draw a model and what so many devices moved of it."""
    random = np.random.default_rng(seed)
    length = layout[-1].offset + layout[-1].size
    sent = update_length(LocalTraining(), layout)
    return Cohort(
        random.standard_normal(length).astype(np.float32),
        (random.standard_normal((count, sent)) / 4).astype(np.float32),
        [int(weight) for weight in random.integers(1, 100, count)],
    )


def terms_of(lora: LoraRule, **more: Any) -> LocalTraining:
    """Return SGD under this rule."""
    values = {"optimizer": Optimizer.SGD, "local_steps": 4, "learning_rate": 0.1} | more
    return LocalTraining(lora=lora, **values)


def server_of(
    terms: LocalTraining, state: ServerState, layout: Layout = LAYOUT, scale: float = SCALE
) -> FactorServer:
    """Return the server's half of the rule."""
    parts = parts_of(terms, layout, state.rounds)
    seed = (terms.seed, state.rounds)
    rule = FACTOR_RULES[terms.lora]
    return FactorServer(rule, layout, parts, state.theta, scale, seed)


def stepped(terms: LocalTraining, state: ServerState, cohort: Cohort) -> ServerState:
    """Make the server's and the devices' part of a round."""
    updates = Updates(
        cohort.shares, lambda index, span: cohort.updates[index, span].astype(np.float64)
    )
    summed = server_of(terms, state).published(updates)
    assert len(summed) == update_length(terms, LAYOUT) + moved_length(terms, LAYOUT)
    return algorithm(terms, LAYOUT).apply(state, summed, len(cohort.weights))


def weights_added(theta: Any) -> list[Float64]:
    """Return what a model adds to each frozen weight: its residual and s B A."""
    theta = np.asarray(theta, np.float64)
    cut = [theta[t.offset : t.offset + t.size].reshape(t.shape) for t in LAYOUT]
    a1, b1, a2, b2, _, w1, w2 = cut
    return [w1 + SCALE * b1 @ a1, w2 + SCALE * b2 @ a2]


def local_models(cohort: Cohort) -> list[Float64]:
    """Return the devices' models in float64; what they sent is all but the residuals."""
    models = []
    for update in cohort.updates.astype(np.float64):
        models.append(cohort.theta.astype(np.float64))
        models[-1][: len(update)] += update
    return models


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from(WITH_RESIDUAL))
def test_the_global_model_is_the_mean_of_the_devices_models(
    count: int, seed: int, lora: LoraRule
) -> None:
    cohort = cohort_of(count, seed)
    after = stepped(terms_of(lora), ServerState(cohort.theta.copy()), cohort)
    models = [weights_added(model) for model in local_models(cohort)]
    for index, found in enumerate(weights_added(after.theta)):
        expected = sum(p * one[index] for p, one in zip(cohort.shares, models, strict=True))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    heads = cohort.theta[HEAD] + cohort.shares @ cohort.updates[:, HEAD]
    np.testing.assert_allclose(after.theta[HEAD], heads, atol=1e-6)
    assert after.rounds == 1


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_fedex_has_the_means_of_both_factors_and_what_they_lack(count: int, seed: int) -> None:
    """The paper's formulas, of one matrix after the other."""
    cohort = cohort_of(count, seed)
    after = stepped(terms_of(LoraRule.FEDEX), ServerState(cohort.theta.copy()), cohort)
    means = cohort.theta[:33] + cohort.shares @ cohort.updates
    np.testing.assert_allclose(after.theta[:33], means, atol=1e-6)
    models = local_models(cohort)
    for start, residual in ((0, 33), (14, 45)):
        a = [model[start : start + 8].reshape(2, 4) for model in models]
        b = [model[start + 8 : start + 14].reshape(3, 2) for model in models]
        products = sum(p * x @ y for p, x, y in zip(cohort.shares, b, a, strict=True))
        mean_b = sum(p * x for p, x in zip(cohort.shares, b, strict=True))
        mean_a = sum(p * y for p, y in zip(cohort.shares, a, strict=True))
        place = slice(residual, residual + 12)
        expected = cohort.theta[place] + SCALE * (products - mean_b @ mean_a).ravel()
        np.testing.assert_allclose(after.theta[place], expected, atol=2e-5)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_flora_stacks(count: int, seed: int) -> None:
    """[p_1 B_1 ...] [A_1; ...], by the stacks themselves; then B = 0 and another A each round."""
    cohort = cohort_of(count, seed)
    terms = terms_of(LoraRule.FLORA)
    after = stepped(terms, ServerState(cohort.theta.copy()), cohort)
    models = local_models(cohort)
    for start, residual in ((0, 33), (14, 45)):
        a = np.vstack([model[start : start + 8].reshape(2, 4) for model in models])
        b = np.hstack(
            [
                p * model[start + 8 : start + 14].reshape(3, 2)
                for p, model in zip(cohort.shares, models, strict=True)
            ]
        )
        place = slice(residual, residual + 12)
        np.testing.assert_allclose(
            after.theta[place], cohort.theta[place] + SCALE * (b @ a).ravel(), atol=2e-5
        )
        assert not after.theta[start + 8 : start + 14].any()
        assert np.abs(after.theta[start : start + 8]).max() <= 0.5 + 1e-6  # 1/sqrt(in)
    again = stepped(terms, after, cohort_of(count, seed + 1))
    drawn = [after.theta[:8], after.theta[14:22], again.theta[:8], again.theta[14:22]]
    assert len({one.tobytes() for one in drawn}) == 4
    same = stepped(terms, ServerState(cohort.theta.copy()), cohort)
    np.testing.assert_array_equal(same.theta, after.theta)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_flexlora_in_a_whole_model(count: int, seed: int) -> None:
    """Residuals rest: the rule has none."""
    cohort = cohort_of(count, seed)
    after = stepped(terms_of(LoraRule.FLEXLORA), ServerState(cohort.theta.copy()), cohort)
    models = local_models(cohort)
    for start in (0, 14):
        whole = sum(
            p * model[start + 8 : start + 14].reshape(3, 2) @ model[start : start + 8].reshape(2, 4)
            for p, model in zip(cohort.shares, models, strict=True)
        )
        u, s, v = np.linalg.svd(whole)
        a = after.theta[start : start + 8].reshape(2, 4).astype(np.float64)
        b = after.theta[start + 8 : start + 14].reshape(3, 2).astype(np.float64)
        np.testing.assert_allclose(b @ a, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    np.testing.assert_array_equal(after.theta[33:], cohort.theta[33:])


# as the coordinator makes it of files


def total_of(
    terms: LocalTraining,
    updates: Float32,
    weights: Sequence[int],
    state: ServerState,
    folder: Path,
    tail: int = 0,
) -> FactoredTotal:
    """Let agents encode, and the coordinator take the files in, the first one last."""
    count, length = updates.shape
    context = crypto.UpdateContext(bytes(16), 1, 1, length, 10, 1 << 10, 1.0, tail_length=tail)
    plan = Plan("", (), LAYOUT, TextClassification(("a", "b"), 8, 0), PlanOrigin("m", RANK, ALPHA))
    round_ = FactorRound(terms, plan, state.rounds, lambda: state)
    total = FactoredTotal(context, round_, lambda slot: folder / str(slot))
    for slot in (*range(1, count), 0):
        encoder = plain.encoder(context, slot, None, np.random.default_rng())
        encoded = b"".join(encoder.encode(updates[slot], weights[slot]))
        (folder / str(slot)).write_bytes(encoded)
        with (folder / str(slot)).open("rb") as file:
            total.add(slot, file)
    return total


@pytest.mark.parametrize("lora", NEEDS_FACTORS)
@pytest.mark.parametrize("personal", [Personal.NONE, Personal.FEDPER])
def test_the_sum_of_files_is_the_rules(tmp_path: Path, lora: LoraRule, personal: Personal) -> None:
    """Slots in another order, a tail behind, and with FedPer a head that is not sent."""
    terms, cohort, random = (
        terms_of(lora, personal=personal),
        cohort_of(4, 3),
        np.random.default_rng(8),
    )
    sent = update_length(terms, LAYOUT)
    tails = random.standard_normal((4, 3)).astype(np.float32)
    updates = np.concatenate([cohort.updates[:, :sent], tails], axis=1)
    state = ServerState(cohort.theta.copy())
    total = total_of(terms, updates, cohort.weights, state, tmp_path, tail=3)
    encoded = b"".join(total.result())
    assert len(encoded) == total.encoded_sum_size
    moved = moved_length(terms, LAYOUT)
    assert moved == (24 if lora in WITH_RESIDUAL else 0)
    longer = crypto.UpdateContext(
        bytes(16), 1, 1, sent + moved + 3, 10, 1 << 10, 1.0, tail_length=3
    )
    (tmp_path / "sum").write_bytes(encoded)
    with (tmp_path / "sum").open("rb") as file:
        opened = plain.open_sum(longer, None, range(4), file)
    np.testing.assert_allclose(opened.mean[-3:], cohort.shares @ tails, atol=1e-6)
    found = algorithm(terms, LAYOUT).apply(state, opened.mean[:-3], 4)
    expected = stepped(terms_of(lora), ServerState(cohort.theta.copy()), cohort)
    if personal is Personal.FEDPER:
        np.testing.assert_array_equal(found.theta[HEAD], cohort.theta[HEAD])
        found.theta[HEAD] = expected.theta[HEAD]
    np.testing.assert_array_equal(found.theta, expected.theta)


def test_products_beyond_float32_end_the_sum_and_not_the_coordinator(tmp_path: Path) -> None:
    """The updates themselves are finite, so they were accepted."""
    terms, cohort = terms_of(LoraRule.FEDEX), cohort_of(3, 5)
    cohort.updates[1, :28] = 1e38
    total = total_of(terms, cohort.updates, cohort.weights, ServerState(cohort.theta), tmp_path)
    with pytest.raises(crypto.NotFinite):
        list(total.result())


# on the device, and what is refused


@pytest.mark.parametrize("lora", LoraRule)
def test_no_device_trains_or_sends_a_residual(lora: LoraRule) -> None:
    parts = parts_of(LocalTraining(lora=lora), LAYOUT, 0)
    residual = set(range(33, P))
    for slices in (parts.shared, parts.private):
        assert not residual & {index for part in slices for index in range(part.start, part.stop)}
    resting = {index for part in parts.resting for index in range(part.start, part.stop)}
    assert residual <= resting


@pytest.mark.parametrize("lora", NEEDS_FACTORS)
def test_terms_that_cannot_go_with_new_factors_are_refused(lora: LoraRule) -> None:
    for values in (
        {"strategy": Strategy.FED_AVG_M, "server_momentum": 0.9},
        {"strategy": Strategy.FED_ADAM, "server_adaptivity": 1e-3},
        {"server_learning_rate": 0.5},
        {"personal": Personal.DITTO, "personal_lambda": 0.5},
    ):
        with pytest.raises(Refused) as refused:
            LocalTraining(lora=lora, **values)  # type: ignore[arg-type]
        assert refused.value.reason is Reason.MALFORMED
        assert "lora FFA" in refused.value.subject
    accepted = LocalTraining(lora=lora, strategy=Strategy.FED_PROX, proximal_mu=0.1)
    assert LocalTraining.from_message(accepted.to_message()) == accepted


@pytest.mark.parametrize("lora", NEEDS_FACTORS)
def test_no_robust_rule_decides_beside_them(lora: LoraRule) -> None:
    median = Aggregation(AggregationRule.MEDIAN)
    found = list(median.problems(Encoding(Protection.PLAIN), LocalTraining(lora=lora), 5))
    assert any("both say what is made of the updates" in problem for problem in found)


def test_a_plan_without_residuals_is_refused_with_the_nearest() -> None:
    without = laid_out(SHAPES)
    for lora in WITH_RESIDUAL:
        with pytest.raises(Refused, match=r"built with --residual.*flexlora"):
            parts_of(LocalTraining(lora=lora), without, 0)
    parts_of(LocalTraining(lora=LoraRule.FLEXLORA), without, 0)


@pytest.mark.parametrize(
    "shapes",
    [
        (SHAPES[0], ("b1", (3, 3), Role.LORA_B)),  # no product
        (*SHAPES, RESIDUALS[0]),  # one of two
        (*SHAPES, RESIDUALS[0], ("w2", (4, 3), Role.RESIDUAL)),  # the other way round
    ],
)
def test_factors_without_a_product_are_refused(shapes: Any) -> None:
    with pytest.raises(Refused, match="pairs of LORA_A"):
        targets_of(laid_out(shapes))


def test_a_layout_with_a_residual_before_what_is_trained_is_refused() -> None:
    """A gradient ends where the residuals begin."""
    layout = laid_out((*SHAPES[:2], RESIDUALS[0], SHAPES[4]))
    with pytest.raises(Refused, match="residuals behind all that is trained"):
        Plan("", (), layout, TextClassification(("a", "b"), 8, 0), PlanOrigin("m", RANK, ALPHA))


# LoRA itself: |(residual + s B A - M_k) X_k|^2 / 2 on each device

ONE = laid_out((*SHAPES[:2], RESIDUALS[0]))


def added(theta: Any) -> Any:
    """Return residual + B A: s is 1."""
    return theta[14:26].reshape(3, 4) + theta[8:14].reshape(3, 2) @ theta[:8].reshape(2, 4)


def device_of(target: Float64, seen: Float64) -> Device:
    """Return a device that fits its matrix where `seen`, X X', shows it."""

    def gradient(theta: Float64) -> Float64:
        a, b = theta[:8].reshape(2, 4), theta[8:14].reshape(3, 2)
        error = (added(theta) - target) @ seen
        slope = np.ones_like(theta)  # in the residual as well: no device may follow it
        slope[:8], slope[8:14] = (b.T @ error).ravel(), (error @ a.T).ravel()
        return slope

    return Device(gradient, 1)


def run_of(terms: LocalTraining, devices: Sequence[Device], rounds: int) -> Float32:
    """Return theta after so many rounds of all devices."""
    theta = np.zeros(26, np.float32)
    theta[:8] = np.random.default_rng(6).uniform(-0.5, 0.5, 8)
    state, rule = ServerState(theta), algorithm(terms, ONE)
    shares = np.full(len(devices), 1 / len(devices))
    for _ in range(rounds):
        sent = [move(device, state, terms, ONE).values for device in devices]
        updates = Updates(shares, lambda k, span, sent=sent: sent[k][span].astype(np.float64))
        server = server_of(terms, state, ONE, 1.0)
        state = rule.apply(state, server.published(updates), len(devices))
    return state.theta


@pytest.mark.parametrize("lora", NEEDS_FACTORS)
def test_devices_that_see_different_sides_of_one_matrix_find_it(lora: LoraRule) -> None:
    """One optimum for all, of rank 2, which no device alone could find: X_k shows half of it."""
    random = np.random.default_rng(31)
    target = random.standard_normal((3, 2)) @ random.standard_normal((2, 4))
    halves = [np.diag([2.0, 1.0, 0, 0]), np.diag([0, 0, 1.0, 2.0])]
    devices = [device_of(target, seen) for seen in halves]
    theta = run_of(terms_of(lora, local_steps=4, learning_rate=0.05), devices, 600)
    assert np.linalg.norm(added(theta) - target) < 1e-3
    alone = run_of(terms_of(lora, local_steps=4, learning_rate=0.05), devices[:1], 600)
    assert np.linalg.norm(added(alone) - target) > 0.1


def test_flora_ends_at_a_mean_of_full_rank_that_no_adapter_of_its_rank_reaches() -> None:
    targets = [np.random.default_rng(21 + k).standard_normal((3, 4)) for k in range(3)]
    mean = np.mean(targets, axis=0)
    assert np.linalg.matrix_rank(mean) == 3
    devices = [device_of(target, np.eye(4)) for target in targets]
    theta = run_of(terms_of(LoraRule.FLORA, local_steps=1, learning_rate=0.2), devices, 300)
    assert np.linalg.norm(added(theta) - mean) < 1e-3


def test_flexlora_ends_as_near_to_it_as_its_rank_allows() -> None:
    """With the rate goes what devices' own second-order terms add to the mean of products."""
    targets = [np.random.default_rng(21 + k).standard_normal((3, 4)) for k in range(3)]
    u, s, v = np.linalg.svd(np.mean(targets, axis=0))
    nearest = (u[:, :2] * s[:2]) @ v[:2]
    devices = [device_of(target, np.eye(4)) for target in targets]
    left = []
    for rate, rounds in ((0.2, 100), (0.02, 1000)):
        terms = terms_of(LoraRule.FLEXLORA, local_steps=1, learning_rate=rate)
        left.append(np.linalg.norm(added(run_of(terms, devices, rounds)) - nearest))
    assert left[1] < min(0.1, left[0] / 4)
