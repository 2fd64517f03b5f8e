"""What travels and what stays: LoRA rules and personal models against their papers' formulas."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import LocalSteps, outgoing, remembered
from fedloom.errors import Reason, Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies import RULES, Layout, algorithm, update_length
from fedloom.strategies.fine_tuning import fine_tuning_terms
from fedloom.strategies.parts import gathered, scattered
from fedloom.strategies.portions import own_model, parts_of, start_of
from fedloom.terms import (
    NEEDS_FACTORS,
    LocalTraining,
    LoraRule,
    Optimizer,
    Personal,
    Schedule,
    Strategy,
    Weighting,
)
from tests.strategies.federation import (
    Device,
    Float32,
    Float64,
    first_state,
    mean_of,
    run,
    run_round,
)
from tests.strategies.samples import ALL_TERMS, terms_of

# Two LoRA pairs of rank 2 on matrices of 3 x 4, and a head of 5 values.
SHAPES: tuple[tuple[str, tuple[int, ...], Role], ...] = (
    ("a1", (2, 4), Role.LORA_A),
    ("b1", (3, 2), Role.LORA_B),
    ("a2", (2, 4), Role.LORA_A),
    ("b2", (3, 2), Role.LORA_B),
    ("head", (5,), Role.HEAD),
)


def laid_out(shapes: tuple[tuple[str, tuple[int, ...], Role], ...] = SHAPES) -> Layout:
    """Return the layout of these tensors."""
    tensors, offset = [], 0
    for name, shape, role in shapes:
        tensors.append(TrainableTensor(name, shape, offset, role))
        offset += tensors[-1].size
    return tuple(tensors)


LAYOUT = laid_out()
P = LAYOUT[-1].offset + LAYOUT[-1].size
PERSONAL: dict[Personal, dict[str, Any]] = {
    Personal.FEDREP: {"head_steps": 2},
    Personal.DITTO: {"personal_lambda": 0.5},
}
A, B, HEAD = Role.LORA_A, Role.LORA_B, Role.HEAD
# What each rule sends and what it keeps, in rounds 1 and 2, from the papers.
SENT = {
    LoraRule.FEDIT: ({A, B}, {A, B}),
    LoraRule.FFA: ({B}, {B}),
    LoraRule.ROLORA: ({B}, {A}),
    LoraRule.FEDSA: ({A}, {A}),
    LoraRule.HETLORA: ({A, B}, {A, B}),
    LoraRule.FLEXLORA: ({A, B}, {A, B}),
}
TRAINED = SENT | {LoraRule.FEDSA: ({A, B}, {A, B})}


def lora_terms(lora: LoraRule, personal: Personal = Personal.NONE, **more: Any) -> LocalTraining:
    """Return plain SGD under these rules."""
    values = {"optimizer": Optimizer.SGD, "local_steps": 4, "learning_rate": 0.125}
    values |= PERSONAL.get(personal, {}) | more
    return LocalTraining(lora=lora, personal=personal, **values)


def roles_mask(roles: set[Role]) -> Any:
    """Return which values have one of these roles."""
    return np.concatenate([np.full(tensor.size, tensor.role in roles) for tensor in LAYOUT])


COUNT_EVERY_UPDATE = (Strategy.FED_NOVA, Strategy.SCAFFOLD, Strategy.FED_DYN)
COMBINATIONS = [
    (lora, personal)
    for lora in SENT  # the rules with residuals: test_factors.py
    for personal in Personal
    if (lora, personal)
    not in ((LoraRule.FEDSA, Personal.DITTO), (LoraRule.FLEXLORA, Personal.DITTO))
    if lora is not LoraRule.HETLORA or personal is Personal.NONE
]


@pytest.mark.parametrize(("lora", "personal"), COMBINATIONS)
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_parts_are_the_papers(lora: LoraRule, personal: Personal, rounds: int) -> None:
    own_head = personal in (Personal.FEDPER, Personal.FEDREP)
    sent = SENT[lora][rounds % 2] | (set() if own_head else {HEAD})
    kept = TRAINED[lora][rounds % 2] - SENT[lora][rounds % 2] | ({HEAD} if own_head else set())
    terms = lora_terms(lora, personal)
    parts = parts_of(terms, LAYOUT, rounds)
    everything = np.arange(P, dtype=np.float32)
    for slices, roles in (
        (parts.shared, sent),
        (parts.private, kept),
        (parts.frozen, {A, B, HEAD} - sent - kept),
    ):
        found = gathered(everything, slices) if slices else np.zeros(0)
        np.testing.assert_array_equal(found, everything[roles_mask(roles)])
    assert update_length(terms, LAYOUT, rounds) == roles_mask(sent).sum()


def test_half_of_an_adapter_travels() -> None:
    adapter = laid_out(SHAPES[:4])
    assert update_length(LocalTraining(), adapter) == 28
    assert update_length(LocalTraining(lora=LoraRule.FFA), adapter) == 12
    assert update_length(LocalTraining(lora=LoraRule.FEDSA), adapter) == 16
    turns = [update_length(LocalTraining(lora=LoraRule.ROLORA), adapter, r) for r in range(4)]
    assert turns == [12, 16, 12, 16]


@given(st.integers(0, 2**32 - 1), st.sampled_from(COMBINATIONS), st.integers(0, 3))
def test_scattering_undoes_gathering(seed: int, rules: Any, rounds: int) -> None:
    parts = parts_of(lora_terms(*rules), LAYOUT, rounds)
    vector = np.random.default_rng(seed).standard_normal(P).astype(np.float32)
    for slices in (parts.shared, parts.private, parts.frozen):
        if slices:
            zeroed = scattered(vector, slices, np.zeros(P, np.float32))
            again = scattered(zeroed, slices, gathered(vector, slices))
            np.testing.assert_array_equal(again, vector)


# the server's step, for every strategy: on what is sent it is the strategy's, elsewhere nothing


@pytest.mark.parametrize("terms", ALL_TERMS, ids=lambda terms: terms.strategy.name)
@pytest.mark.parametrize("lora", set(SENT) - set(NEEDS_FACTORS))
def test_a_strategy_works_on_what_is_sent_as_on_a_whole_model(
    terms: LocalTraining, lora: LoraRule
) -> None:
    """The oracle is the same strategy for each factor alone, as if it were all there is."""
    if terms.is_asynchronous and lora not in (LoraRule.FEDIT, LoraRule.FFA):
        with pytest.raises(Refused, match="lora FEDIT or FFA"):
            replace(terms, lora=lora)
        return
    if lora is LoraRule.HETLORA and terms.strategy in COUNT_EVERY_UPDATE:
        return  # refused
    terms, random = replace(terms, lora=lora), np.random.default_rng(5)
    alone = algorithm(replace(terms, lora=LoraRule.FEDIT))
    rule, theta = algorithm(terms, LAYOUT), random.standard_normal(P).astype(np.float32)
    count = len(RULES[terms.strategy].remembers)
    state, memory = rule.init(theta), tuple(np.zeros(P, np.float32) for _ in range(count))
    masks = [roles_mask(SENT[lora][turn] | {HEAD}) for turn in (0, 1)]
    if lora is not LoraRule.ROLORA:
        mask = masks[0]
        expected = alone.init(theta[mask])
        own = tuple(one[mask] for one in memory)
    for number in range(4):
        mask = masks[number % 2]
        if lora is LoraRule.ROLORA:  # whose head moves in both turns
            inside = tuple(vector[mask] for vector in state.vectors)
            expected = type(state)(state.theta[mask], number, inside)
            own = tuple(one[mask] for one in memory)
        delta = random.standard_normal(P).astype(np.float32)
        linear, other = rule.linear(state, memory), alone.linear(expected, own)
        assert (linear is None) == (other is None)
        if linear is not None and other is not None:
            np.testing.assert_array_equal(linear[mask], other)
            assert not linear[~mask].any()
        sent = rule.sent(state, memory, delta.copy(), 4.0)
        given_alone = alone.sent(expected, own, delta[mask], 4.0)
        given, as_alone = (
            one.joined(at, of.values, 1)
            for one, at, of in ((rule, state, sent), (alone, expected, given_alone))
        )
        np.testing.assert_array_equal(given, as_alone)
        np.testing.assert_array_equal(sent.values, given_alone.values)
        memory, own = sent.memory, given_alone.memory
        before, state = state, rule.apply(state, sent.values.copy(), 2)
        expected = alone.apply(expected, given_alone.values.copy(), 2)
        for found, wanted, old in zip(
            (state.theta, *state.vectors),
            (expected.theta, *expected.vectors),
            (before.theta, *before.vectors),
            strict=True,
        ):
            np.testing.assert_array_equal(found[mask], wanted)
            np.testing.assert_array_equal(found[~mask], old[~mask])


# on the device


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("lora", SENT)
def test_what_rests_does_not_move_whatever_pushes_it(lora: LoraRule, optimizer: Optimizer) -> None:
    """Neither a gradient nor momentum nor decay."""
    more = {"momentum": 0.5} if optimizer is Optimizer.SGD else {}
    terms = LocalTraining(lora=lora, optimizer=optimizer, weight_decay=0.5, local_steps=5, **more)
    start = np.linspace(1, 2, P, dtype=np.float32)
    for rounds in (0, 1):
        theta, parts = start.copy(), parts_of(terms, LAYOUT, rounds)
        local = LocalSteps(start, terms, 5, None, parts)
        for _ in range(5):
            local.step(theta, np.ones(P, np.float32))
        moves = roles_mask(TRAINED[lora][rounds] | {HEAD})
        np.testing.assert_array_equal(theta != start, moves)


def test_what_rests_does_not_count_in_the_norm_that_is_clipped() -> None:
    terms = lora_terms(LoraRule.FFA, gradient_clip=1.0, learning_rate=1.0)
    gradient, start = np.full(P, 1e6, np.float32), np.zeros(P, np.float32)
    moves = roles_mask({B, HEAD})
    gradient[moves] = 0.5 / np.sqrt(moves.sum())
    theta = start.copy()
    LocalSteps(start, terms, 4, None, parts_of(terms, LAYOUT, 0)).step(theta, gradient.copy())
    np.testing.assert_array_equal(theta[moves], -gradient[moves])


def test_fedrep_trains_the_head_first_and_everything_else_after() -> None:
    terms = lora_terms(LoraRule.FEDIT, Personal.FEDREP, momentum=0.5)
    start, head = np.zeros(P, np.float32), roles_mask({HEAD})
    theta, moved = start.copy(), []
    local = LocalSteps(start, terms, 4, None, parts_of(terms, LAYOUT, 0))
    for _ in range(4):
        before = theta.copy()
        local.step(theta, np.ones(P, np.float32))
        moved.append(theta != before)
    for step, found in enumerate(moved):
        np.testing.assert_array_equal(found, head if step < 2 else ~head)


def test_fedrep_needs_steps_for_the_rest() -> None:
    terms = lora_terms(LoraRule.FEDIT, Personal.FEDREP, head_steps=4)
    with pytest.raises(Refused, match="more than 4 steps"):
        LocalSteps(np.zeros(P, np.float32), terms, 4, None, parts_of(terms, LAYOUT, 0))


def quadratic(centre: Float64) -> Device:
    """Return a device whose loss is 1/2 |theta - centre|^2."""
    return Device(lambda theta: theta - centre, 1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([Personal.FEDPER, Personal.FEDREP]))
def test_a_private_head_is_the_devices_alone(seed: int, personal: Personal) -> None:
    """FedPer and FedRep by hand, in float64: gradient descent on |theta - centre|^2 / 2."""
    random, head = np.random.default_rng(seed), roles_mask({HEAD})
    centres = [random.standard_normal(P) for _ in range(3)]
    devices, start = [quadratic(centre) for centre in centres], np.zeros(P, np.float32)
    terms = lora_terms(LoraRule.FEDIT, personal, weighting=Weighting.UNIFORM)
    state = first_state(terms, start, devices)
    base, heads = np.zeros(P), [np.zeros(P) for _ in centres]
    for _ in range(3):
        state = run_round(terms, state, devices, 3, LAYOUT)
        bases = []
        for k, centre in enumerate(centres):
            theta = np.where(head, heads[k], base)
            for step in range(4):
                moves = np.ones(P, bool)
                if personal is Personal.FEDREP:
                    moves = head if step < 2 else ~head
                theta = np.where(moves, theta - 0.125 * (theta - centre), theta)
            heads[k] = theta
            bases.append(theta)
        base = np.mean(bases, axis=0)
    np.testing.assert_allclose(state.theta[~head], base[~head], atol=1e-5)
    np.testing.assert_array_equal(state.theta[head], start[head])
    for device, own in zip(devices, heads, strict=True):
        model = own_model(terms, LAYOUT, state.theta, device.memory)
        np.testing.assert_allclose(model, np.where(head, own, base), atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 2))
def test_ditto_is_the_papers(seed: int, lam: float) -> None:
    """v <- v - eta (grad F_k(v) + lambda (v - w)), from the w that the round begins with."""
    random = np.random.default_rng(seed)
    centres = [random.standard_normal(P) for _ in range(3)]
    devices, start = [quadratic(centre) for centre in centres], np.zeros(P, np.float32)
    terms = lora_terms(
        LoraRule.FEDIT, Personal.DITTO, personal_lambda=lam, weighting=Weighting.UNIFORM
    )
    state = first_state(terms, start, devices)
    w, own = np.zeros(P), [np.zeros(P) for _ in centres]
    for _ in range(3):
        state = run_round(terms, state, devices, 3, LAYOUT)
        moved = []
        for k, centre in enumerate(centres):
            theta = w.copy()
            for _ in range(4):
                theta = theta - 0.125 * (theta - centre)
                own[k] = own[k] - 0.125 * ((own[k] - centre) + lam * (own[k] - w))
            moved.append(theta)
        w = np.mean(moved, axis=0)
    np.testing.assert_allclose(state.theta, w, atol=1e-5)
    for device, v in zip(devices, own, strict=True):
        model = own_model(terms, LAYOUT, state.theta, device.memory)
        np.testing.assert_allclose(model, v, atol=1e-5)


def test_ditto_ends_between_the_global_model_and_its_own_optimum() -> None:
    """At the end v minimises F_k + lambda/2 |v - w|^2: (centre + lambda w) / (1 + lambda)."""
    centres = [np.full(P, 1.0), np.full(P, 3.0)]
    devices = [quadratic(centre) for centre in centres]
    terms = lora_terms(LoraRule.FEDIT, Personal.DITTO, weighting=Weighting.UNIFORM)
    theta = run(terms, np.zeros(P, np.float32), devices, 60, None, LAYOUT)
    np.testing.assert_allclose(theta, 2.0, atol=1e-4)
    np.testing.assert_allclose(devices[0].memory[-1], (1 + 0.5 * 2) / 1.5, atol=1e-4)
    np.testing.assert_allclose(devices[1].memory[-1], (3 + 0.5 * 2) / 1.5, atol=1e-4)


# LoRA itself: |B A - M_k|^2 / 2 on each device


def factorisation(target: Float64) -> Device:
    """Return a device that fits a 3 x 4 matrix by the first pair; the rest has no loss."""

    def gradient(theta: Float64) -> Float64:
        a, b = theta[:8].reshape(2, 4), theta[8:14].reshape(3, 2)
        error = b @ a - target
        slope = np.zeros_like(theta)
        slope[:8], slope[8:14] = (b.T @ error).ravel(), (error @ a.T).ravel()
        return slope

    return Device(gradient, 1)


PAIR = laid_out(SHAPES[:2])


def lora_start() -> Float32:
    """Return A as drawn and B of zeros."""
    theta = np.zeros(14, np.float32)
    theta[:8] = np.random.default_rng(6).standard_normal(8) / 2
    return theta


def product(theta: Any) -> Any:
    """Return B A."""
    return theta[8:14].reshape(3, 2) @ theta[:8].reshape(2, 4)


@pytest.mark.parametrize("lora", [LoraRule.FFA, LoraRule.ROLORA])
@pytest.mark.parametrize("rounds", [0, 1])
def test_the_mean_of_products_is_exact_where_one_factor_rests(lora: LoraRule, rounds: int) -> None:
    random = np.random.default_rng(7)
    terms = lora_terms(lora, weighting=Weighting.UNIFORM)
    devices = [factorisation(random.standard_normal((3, 4))) for _ in range(3)]
    state = first_state(terms, lora_start(), devices)
    state = replace(state, theta=state.theta + np.float32(0.1), rounds=rounds)
    each = [run_round(terms, state, [device], 2, PAIR).theta for device in devices]
    both = run_round(terms, state, devices, 2, PAIR).theta
    np.testing.assert_allclose(product(both), np.mean([product(t) for t in each], 0), atol=1e-6)


def test_it_is_not_where_both_move() -> None:
    random = np.random.default_rng(7)
    terms = lora_terms(LoraRule.FEDIT, weighting=Weighting.UNIFORM)
    devices = [factorisation(random.standard_normal((3, 4))) for _ in range(3)]
    state = first_state(terms, lora_start() + np.float32(0.1), devices)
    each = [run_round(terms, state, [device], 2, PAIR).theta for device in devices]
    both = run_round(terms, state, devices, 2, PAIR).theta
    assert np.abs(product(both) - np.mean([product(t) for t in each], 0)).max() > 1e-3


@pytest.mark.parametrize("lora", [LoraRule.FEDIT, LoraRule.ROLORA])
def test_rules_that_learn_both_factors_find_a_matrix_of_their_rank(lora: LoraRule) -> None:
    random = np.random.default_rng(8)
    target = random.standard_normal((3, 2)) @ random.standard_normal((2, 4)) / 2
    devices = [factorisation(target + d * np.ones((3, 4))) for d in (-0.1, 0.0, 0.1)]
    terms = lora_terms(lora, weighting=Weighting.UNIFORM)
    theta = run(terms, lora_start(), devices, 300, None, PAIR)
    assert np.abs(product(theta) - target).max() < 0.02


def test_ffa_solves_its_convex_problem() -> None:
    """With A fixed the loss is convex in B, whose optimum is M A^+ for the mean M."""
    random = np.random.default_rng(9)
    targets = [random.standard_normal((3, 4)) for _ in range(3)]
    terms = lora_terms(LoraRule.FFA, weighting=Weighting.UNIFORM)
    devices = [factorisation(target) for target in targets]
    theta = run(terms, lora_start(), devices, 400, None, PAIR)
    a = lora_start()[:8].reshape(2, 4).astype(np.float64)
    np.testing.assert_array_equal(theta[:8], lora_start()[:8])
    expected = np.mean(targets, axis=0) @ np.linalg.pinv(a)
    np.testing.assert_allclose(theta[8:].reshape(3, 2), expected, atol=1e-3)


def test_fedsa_gives_each_device_its_own_product() -> None:
    """Matrices of one row space: a common A, and a B for each device, fit all of them at once."""
    random = np.random.default_rng(10)
    rows = random.standard_normal((2, 4)) / 2
    targets = [random.standard_normal((3, 2)) @ rows for _ in range(3)]
    devices = [factorisation(target) for target in targets]
    terms = lora_terms(LoraRule.FEDSA, weighting=Weighting.UNIFORM)
    theta = run(terms, lora_start(), devices, 600, None, PAIR)
    np.testing.assert_array_equal(theta[8:], 0)  # the server never sees a B
    for device, target in zip(devices, targets, strict=True):
        own = own_model(terms, PAIR, theta, device.memory)
        assert np.abs(product(own) - target).max() < 0.05


@pytest.mark.parametrize("lora", SENT)
def test_the_order_of_devices_does_not_matter(lora: LoraRule) -> None:
    random = np.random.default_rng(11)
    targets = [random.standard_normal((3, 4)) for _ in range(4)]
    terms = lora_terms(lora, weighting=Weighting.UNIFORM)
    ends = [
        run(terms, lora_start(), [factorisation(targets[k]) for k in order], 3, None, PAIR)
        for order in ((0, 1, 2, 3), (3, 1, 0, 2))
    ]
    np.testing.assert_allclose(*ends, atol=1e-6)


# what goes with what


def test_a_plan_without_a_in_theta_needs_nothing_of_ffa() -> None:
    frozen = laid_out((SHAPES[1], SHAPES[4]))
    assert update_length(LocalTraining(lora=LoraRule.FFA), frozen) == 11
    for lora in (LoraRule.ROLORA, LoraRule.FEDSA):
        with pytest.raises(Refused, match=r"LORA_A in the plan's layout .* lora = 'ffa'") as found:
            algorithm(LocalTraining(lora=lora), frozen)
        assert found.value.reason is Reason.PLAN_UNSUPPORTED


def test_a_model_without_an_adapter_takes_fedit_and_ffa() -> None:
    network = laid_out((("weight", (7,), Role.WEIGHT),))
    assert update_length(LocalTraining(lora=LoraRule.FFA), network) == 7
    with pytest.raises(Refused, match="lora = 'fedit'"):
        algorithm(LocalTraining(lora=LoraRule.ROLORA), network)
    with pytest.raises(Refused, match=r"HEAD .* personal = 'ditto'"):
        algorithm(LocalTraining(personal=Personal.FEDPER), network)


def test_a_head_alone_cannot_be_kept() -> None:
    with pytest.raises(Refused, match="more than the parts that stay"):
        algorithm(LocalTraining(personal=Personal.FEDPER), laid_out((SHAPES[4],)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"personal": Personal.DITTO}, "personal_lambda above 0"),
        ({"personal_lambda": 0.5}, "personal_lambda 0 unless"),
        ({"personal": Personal.FEDREP}, "head_steps above 0"),
        ({"head_steps": 1}, "head_steps 0 unless"),
        (
            {"personal": Personal.DITTO, "personal_lambda": 0.5, "lora": LoraRule.FEDSA},
            "lora FFA goes with DITTO",
        ),
    ],
)
def test_terms_that_do_not_go_together_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused, match=told):
        LocalTraining(**values)


@pytest.mark.parametrize("terms", ALL_TERMS, ids=lambda terms: terms.strategy.name)
def test_every_run_can_be_fine_tuned(terms: LocalTraining) -> None:
    """What a device does alone at the end is plain training, whatever the run was."""
    rules = {"fine_tune_steps": 3}
    if not terms.is_asynchronous:
        rules |= {"personal": Personal.DITTO, "personal_lambda": 0.5}
    more = {"warmup_steps": 50, "round_schedule": Schedule.COSINE, "lora": LoraRule.FFA}
    plainly = fine_tuning_terms(replace(terms, **rules, **more))  # type: ignore[arg-type]
    assert (plainly.strategy, plainly.local_steps) == (Strategy.FED_AVG, 3)
    assert plainly.optimizer is terms.optimizer
    assert plainly.warmup_steps < plainly.local_steps


def test_memory_holds_the_strategys_vectors_and_then_the_own_model() -> None:
    terms = terms_of(Strategy.SCAFFOLD, personal=Personal.FEDPER)
    assert remembered(terms) == 2
    random = np.random.default_rng(12)
    memory = (np.zeros(P, np.float32), random.standard_normal(P).astype(np.float32))
    state = algorithm(terms, LAYOUT).init(np.ones(P, np.float32))
    start, head = start_of(terms, LAYOUT, state.theta, memory), roles_mask({HEAD})
    np.testing.assert_array_equal(start, np.where(head, memory[1], state.theta))
    delta = random.standard_normal(P).astype(np.float32)
    sent = outgoing(terms, state, memory, LocalUpdate(delta, 4, 0.0), LAYOUT, start + delta)
    assert len(sent.memory) == 2
    assert not sent.memory[0][head].any()  # c_i of what is not sent stays 0
    np.testing.assert_array_equal(sent.memory[1], start + delta)
    assert len(mean_of([sent])) == update_length(terms, LAYOUT)
