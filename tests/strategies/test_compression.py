"""What travels of a movement: which places, on average the whole, and what is left comes later."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import outgoing, remembered
from fedloom.compression import MOVEMENTS, Compression, chosen_count
from fedloom.errors import Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies import RULES, ServerState, algorithm, update_length
from fedloom.strategies.parts import gathered, unfolded
from fedloom.strategies.portions import parts_of
from fedloom.strategies.random_mask import RandomMask
from fedloom.terms import NEEDS_FACTORS, LocalTraining, LoraRule, Personal, Strategy, Weighting
from tests.strategies.federation import Device, run
from tests.strategies.samples import terms_of
from tests.strategies.test_convergence import OPTIMUM, SGD, START, distance, quadratic_devices

LAYOUT = (
    TrainableTensor("lora_A", (2, 50), 0, Role.LORA_A),
    TrainableTensor("lora_B", (70, 2), 100, Role.LORA_B),
    TrainableTensor("classifier", (60,), 240, Role.HEAD),
)
P = 300
MASK: dict[str, Any] = {"compression": Compression.RANDOM_MASK, "compression_share": 0.3}
TOP: dict[str, Any] = {"compression": Compression.TOP_K, "compression_share": 0.1}


def places_by_the_book(seed: int, rounds: int, length: int, count: int) -> list[int]:
    """control.proto in integers, one block of AES at a time."""
    label = b"fedloom v1 random mask\0"
    key = hashlib.sha256(label + seed.to_bytes(8, "little") + rounds.to_bytes(8, "little")).digest()
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the block cipher
    stream = b"".join(aes.update(i.to_bytes(16, "big")) for i in range(count // 2 + 1))
    found = []
    for j in range(count):
        low, high = j * length // count, (j + 1) * length // count
        found.append(low + int.from_bytes(stream[8 * j : 8 * j + 8], "little") % (high - low))
    return found


@given(
    seed=st.integers(0, 2**64 - 1),
    rounds=st.integers(0, 2**64 - 1),
    length=st.integers(1, 3000),
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_the_places_are_those_of_the_contract(
    seed: int, rounds: int, length: int, share: float
) -> None:
    count = chosen_count(share, length)
    mask = RandomMask(seed, rounds, length, count)
    places = mask.places()
    assert places.tolist() == places_by_the_book(seed, rounds, length, count)
    assert (np.diff(places.astype(np.int64)) > 0).all()
    assert mask.widths().sum() == length
    assert places[-1] < length


def test_a_long_mask_is_drawn_as_a_short_one() -> None:
    """Blocks of strata, and numbers of strata times values beyond 2^32."""
    length, count = 1_000_000, 40_000
    assert RandomMask(3, 1, length, count).places().tolist() == places_by_the_book(
        3, 1, length, count
    )


def test_every_place_has_its_turns() -> None:
    """In 4,000 rounds of one seed each place is drawn about 4,000 / width times (6 sigma)."""
    rounds, length, count = 4000, 50, 15
    drawn = np.zeros(length)
    for number in range(rounds):
        drawn[RandomMask(0, number, length, count).places()] += 1
    width = np.repeat(RandomMask(0, 0, length, count).widths(), [3, 3, 4] * 5)
    expected = rounds / width
    assert (np.abs(drawn - expected) < 6 * np.sqrt(expected)).all()


@given(
    places=st.sets(st.integers(0, 199), min_size=1),
    lora=st.sampled_from([LoraRule.FFA, LoraRule.ROLORA]),
    rounds=st.integers(0, 1),
)
def test_places_among_the_parts_are_found_in_the_whole(
    places: set[int], lora: LoraRule, rounds: int
) -> None:
    shared = parts_of(LocalTraining(lora=lora), LAYOUT, rounds).shared
    everywhere = gathered(np.arange(P, dtype=np.float32), shared)
    inside = np.array(sorted(p for p in places if p < len(everywhere)), np.uint32)
    assert unfolded(inside, shared).tolist() == everywhere[inside].tolist()


@pytest.mark.parametrize("strategy", [Strategy[name] for name in MOVEMENTS], ids=lambda s: s.name)
def test_theta_and_the_servers_vectors_rest_elsewhere(strategy: Strategy) -> None:
    """At the places of the mask the server's step is that of whole updates, value by value."""
    random = np.random.default_rng(0)
    terms, whole = terms_of(strategy, **MASK), terms_of(strategy)
    state = algorithm(whole).init(random.standard_normal(P).astype(np.float32))
    rule = algorithm(terms)
    for number in range(3):
        movement = random.standard_normal(P).astype(np.float32)
        places = RandomMask.of(terms, number, P).places()
        assert len(places) == update_length(terms, LAYOUT, number) == 90
        before = [vector.copy() for vector in (state.theta, *state.vectors)]
        expected = algorithm(whole).apply(state, movement.copy(), 3)
        state = rule.apply(state, movement[places], 3)
        assert state.rounds == number + 1
        moved = (state.theta, *state.vectors)
        for old, new, step in zip(before, moved, (expected.theta, *expected.vectors), strict=True):
            old[places] = step[places]
            np.testing.assert_array_equal(new, old)


def test_unbiased_masks_move_theta_by_the_whole_movement_on_average() -> None:
    terms = LocalTraining(unbiased=True, **MASK)
    movement = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    theta, rounds = np.zeros(50, np.float32), 4000
    moved = np.zeros(50)
    for number in range(rounds):
        state = ServerState(theta, number)
        sent = algorithm(terms).sent(state, (), movement.copy(), 1.0)
        moved += algorithm(terms).apply(state, sent.values, 1).theta
    sigma = np.abs(movement) * np.sqrt(3 / rounds)  # widths up to 4: variance (width - 1) x^2
    assert (np.abs(moved / rounds - movement) < 6 * sigma).all()


def test_every_mask_counts_its_values_for_their_strata() -> None:
    """Exactly, over all masks of one stratum: the sum of width * x over places is the total."""
    terms = LocalTraining(unbiased=True, **(MASK | {"compression_share": 0.25}))
    theta = np.zeros(8, np.float32)
    for number in range(20):
        places = RandomMask.of(terms, number, 8).places()
        found = algorithm(terms).apply(ServerState(theta, number), np.float32([1, 2]), 1)
        expected = theta.copy()
        expected[places] = [4, 8]
        np.testing.assert_array_equal(found.theta, expected)


_WHOLE = st.integers(-1000, 1000)


@settings(max_examples=60)
@given(
    kind=st.sampled_from([MASK, TOP]),
    lora=st.sampled_from([LoraRule.FEDIT, LoraRule.FFA, LoraRule.ROLORA]),
    personal=st.sampled_from([Personal.NONE, Personal.FEDPER]),
    seed=st.integers(0, 1000),
    clips=st.lists(st.sampled_from([100.0, 700.0, 3000.0, math.inf]), min_size=1, max_size=8),
)
def test_what_was_sent_and_what_waits_add_up_to_what_moved(
    kind: dict[str, Any], lora: LoraRule, personal: Personal, seed: int, clips: list[float]
) -> None:
    """Whatever the clips cut off, an attempt with another clip before it included."""
    terms = LocalTraining(lora=lora, personal=personal, error_feedback=True, **kind)
    random = np.random.default_rng(seed)
    state = ServerState(np.zeros(P, np.float32))
    assert remembered(terms) == 1 + (personal is Personal.FEDPER)
    memory = tuple(np.zeros(P, np.float32) for _ in range(remembered(terms)))
    moved, sent = np.zeros(P), np.zeros(P)
    for number, clip in enumerate(clips):
        state = replace(state, rounds=number)
        delta = random.integers(-1000, 1001, P).astype(np.float32)  # exact in float32
        shared = parts_of(terms, LAYOUT, number).shared
        for part in shared:
            moved[part] += delta[part]
        own = None if personal is Personal.NONE else np.ones(P, np.float32)
        out = outgoing(terms, state, memory, LocalUpdate(delta, 1, 0.0), LAYOUT, own)
        assert len(out.values) == update_length(terms, LAYOUT, number)
        if kind is TOP:
            clip = math.inf  # `plain` cuts nothing
        out.remembered(50.0 if kind is MASK else clip)
        memory = tuple(vector.copy() for vector in out.remembered(clip))
        values = np.clip(out.values, -clip, clip).astype(np.float64)
        in_shared = np.zeros(update_length(replace(terms, **_nothing()), LAYOUT, number))
        if kind is MASK:
            in_shared[RandomMask.of(terms, number, len(in_shared)).places()] = values
        else:
            in_shared += values
        start = 0
        for part in shared:
            end = start + part.stop - part.start
            sent[part] += in_shared[start:end]
            start = end
    np.testing.assert_array_equal(sent + memory[0], moved)


def _nothing() -> dict[str, Any]:
    return {"compression": Compression.NONE, "compression_share": 0.0, "error_feedback": False}


@given(st.lists(_WHOLE, min_size=10, max_size=60))
def test_top_k_sends_values_none_of_which_is_smaller_than_one_that_stays(values: list[int]) -> None:
    terms = LocalTraining(error_feedback=False, **TOP)
    delta = np.array(values, np.float32)
    sent = algorithm(terms).sent(ServerState(delta), (), delta.copy(), 1.0).values
    chosen = sent != 0
    count = chosen_count(0.1, len(values))
    assert chosen.sum() <= count
    np.testing.assert_array_equal(sent[chosen], delta[chosen])
    left = np.abs(delta[~chosen])
    if chosen.sum() == count:
        assert np.abs(sent[chosen]).min(initial=np.inf) >= left.max(initial=0)
    else:
        assert not left.any()


def ef_by_the_book(kind: dict[str, Any], rounds: int, rate: float) -> np.ndarray:
    """arXiv:1901.09847v2, Algorithm 2, on each device, and the mean applied; in float64."""
    devices, theta = quadratic_devices(), START.astype(np.float64)
    waiting = [np.zeros(len(theta)) for _ in devices]
    for number in range(rounds):
        total = np.zeros(len(theta))
        for index, device in enumerate(devices):
            p = -rate * device.gradient(theta) + waiting[index]
            count = math.ceil(kind["compression_share"] * len(p))
            if kind["compression"] is Compression.TOP_K:
                chosen = np.argsort(-np.abs(p), kind="stable")[:count]
            else:
                chosen = np.array(places_by_the_book(0, number, len(p), count))
            sent = np.zeros(len(p))
            sent[chosen] = p[chosen]
            waiting[index] = p - sent
            total += sent / len(devices)
        theta = theta + total
    return theta


ONE_STEP: dict[str, Any] = SGD | {
    "learning_rate": 0.03,
    "local_steps": 1,
    "weighting": Weighting.UNIFORM,
}


@pytest.mark.parametrize("kind", [MASK, TOP], ids=["mask", "top"])
def test_error_feedback_is_the_papers(kind: dict[str, Any]) -> None:
    terms = LocalTraining(error_feedback=True, **ONE_STEP, **kind)
    found = with_feedback(terms, 40)
    np.testing.assert_allclose(found, ef_by_the_book(kind, 40, 0.03), rtol=0, atol=1e-5)


def with_feedback(terms: LocalTraining, rounds: int) -> np.ndarray:
    return run(terms, START, quadratic_devices(), rounds)


FEEDBACK: dict[str, Any] = {"error_feedback": True}


@pytest.mark.parametrize("change", [MASK | FEEDBACK, MASK | {"unbiased": True}], ids=str)
def test_masks_lead_to_the_optimum(change: dict[str, Any]) -> None:
    terms = LocalTraining(**ONE_STEP | {"learning_rate": 0.02}, **change)
    assert distance(with_feedback(terms, 1500)) < 1e-4


def test_top_k_with_feedback_ends_nearer_with_a_smaller_rate_and_without_it_elsewhere() -> None:
    """Devices disagree at the optimum, and what one keeps to itself for ever is no noise."""
    ends = [
        distance(run(terms, OPTIMUM.astype(np.float32), quadratic_devices(), 1500))
        for terms in (
            LocalTraining(**ONE_STEP | {"learning_rate": 0.02}, **TOP | FEEDBACK),
            LocalTraining(**ONE_STEP | {"learning_rate": 0.001}, **TOP | FEEDBACK),
            LocalTraining(**ONE_STEP | {"learning_rate": 0.001}, **TOP),
        )
    ]
    assert ends[1] < 0.01
    assert ends[1] < ends[0] < 0.2
    assert ends[2] > 0.3


def test_a_mask_without_feedback_descends_on_its_places() -> None:
    """As coordinate descent: to the optimum too, in about 1/share as many rounds."""
    terms = LocalTraining(**ONE_STEP, **MASK)
    assert distance(with_feedback(terms, 1500)) < 1e-3


@pytest.mark.parametrize("change", [{"unbiased": True}, FEEDBACK], ids=str)
def test_masks_that_make_up_for_the_rest_overshoot_where_rounds_move_all_the_way(
    change: dict[str, Any],
) -> None:
    """The limit that the module states: by what a value has missed; as it is, a mask does not."""
    one = [Device(lambda w: w - 1.0, 1)]
    step: dict[str, Any] = SGD | {"learning_rate": 1.0, "local_steps": 1}
    thin = MASK | {"compression_share": 0.2}
    start = np.zeros(10, np.float32)
    assert np.abs(run(LocalTraining(**step, **thin, **change), start, one, 60)).max() > 100
    as_it_is = run(LocalTraining(**step, **thin), start, one, 60)
    np.testing.assert_array_equal(as_it_is, np.ones(10))


@pytest.mark.parametrize(
    "change",
    [
        {"compression": Compression.RANDOM_MASK},
        {"compression": Compression.RANDOM_MASK, "compression_share": 1.0},
        {"compression": Compression.TOP_K, "compression_share": 0.51},
        {"compression": Compression.QUANTISED, "compression_share": 0.1},
        {"compression": Compression.QUANTISED, "error_feedback": True},
        {"compression_share": 0.1},
        {"error_feedback": True},
        {"unbiased": True},
        TOP | {"unbiased": True},
        MASK | {"unbiased": True, "error_feedback": True},
        *(MASK | {"lora": rule} for rule in NEEDS_FACTORS),
    ],
    ids=str,
)
def test_terms_that_do_not_go_together_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="expected"):
        LocalTraining(**change)


# One vector, and yet no movement from the state that it is added to: weights, or an older state's.
MORE_THAN_IT = (Strategy.FED_MA, Strategy.FED_BUFF, Strategy.FED_ASYNC)


@pytest.mark.parametrize("kind", [kind for kind in Compression if kind is not Compression.NONE])
@pytest.mark.parametrize("strategy", Strategy)
def test_strategies_that_send_more_than_a_movement_are_refused(
    strategy: Strategy, kind: Compression
) -> None:
    share = 0.1 if kind.chooses else 0.0
    rule = RULES[strategy]
    only_movement = len(rule.sends) == 1 and not rule.remembers and strategy not in MORE_THAN_IT
    assert (strategy.name in MOVEMENTS) == only_movement
    if only_movement:
        terms_of(strategy, compression=kind, compression_share=share)
    else:
        with pytest.raises(Refused, match="FED_AVG or FED_PROX"):
            terms_of(strategy, compression=kind, compression_share=share)
