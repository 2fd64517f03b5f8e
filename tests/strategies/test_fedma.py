"""FedMA: neurons that are the same are found whatever their order; what is no chain is refused."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crypto
from coordinator.plans.permutations import permuted
from coordinator.strategies.matching import MatchedTotal, match
from crypto import plain
from edge_agent.batches import LabelledArrays
from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import LocalSteps, outgoing
from edge_agent.local_training import label_counts
from fedloom.errors import Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies import ServerState, algorithm, update_length
from fedloom.strategies.fedma import chain, label_shares, matched_parts, open_layers
from fedloom.strategies.fedma import outputs as outputs_of
from fedloom.strategies.parts import Layout
from fedloom.strategies.portions import parts_of, sends_everything
from fedloom.tasks import ArrayInput, ArrayLearning
from fedloom.terms import LocalTraining, LoraRule, Personal, Strategy
from tests.strategies.federation import Float32, Float64
from tests.strategies.samples import terms_of

TERMS = terms_of(Strategy.FED_MA, local_steps=1)


def layout_of(*tensors: tuple[str, tuple[int, ...]], role: Role = Role.WEIGHT) -> Layout:
    """Lay tensors one after another."""
    laid: list[TrainableTensor] = []
    for name, shape in tensors:
        offset = laid[-1].offset + laid[-1].size if laid else 0
        laid.append(TrainableTensor(name, shape, offset, role))
    return tuple(laid)


MLP = layout_of(
    ("0.weight", (5, 3)),
    ("0.bias", (5,)),
    ("2.weight", (4, 5)),
    ("2.bias", (4,)),
    ("4.weight", (2, 4)),
    ("4.bias", (2,)),
)
CNN = layout_of(  # of images (1, 3, 3), with kernels of 2: (3, 2, 2) is flattened to 12
    ("0.weight", (3, 1, 2, 2)),
    ("3.weight", (4, 12)),
    ("3.bias", (4,)),
    ("5.weight", (2, 4)),
)


def length_of(layout: Layout) -> int:
    return layout[-1].offset + layout[-1].size


def tensors_of(layout: Layout, theta: Float64) -> dict[str, Float64]:
    """Return a model's tensors by name."""
    return {t.name: theta[t.offset : t.offset + t.size].reshape(t.shape) for t in layout}


def outputs(layout: Layout, theta: Float64, rows: Float64) -> Float64:
    """Compute the model, written down once more: layers, tanh between them."""
    found = tensors_of(layout, np.asarray(theta, np.float64))
    names = list(dict.fromkeys(name.split(".")[0] for name in found))
    x = rows
    for name in names:
        weight = found[f"{name}.weight"]
        if weight.ndim == 4:
            places = list(itertools.product(range(2), range(2)))
            x = np.stack(
                [
                    np.einsum("nchw,ochw->no", x[:, :, i : i + 2, j : j + 2], weight)
                    for i, j in places
                ],
                axis=-1,
            )
        else:
            x = x.reshape(len(x), -1) @ weight.T + found.get(f"{name}.bias", 0.0)
        x = np.tanh(x) if name != names[-1] else x
    return x


def rows_for(layout: Layout) -> Float64:
    shape = (1, 3, 3) if layout is CNN else (3,)
    return np.random.default_rng(0).standard_normal((6, *shape))


def shuffled(layout: Layout, theta: Float32, seed: int) -> Float32:
    """Give every hidden layer another order; the model computes the same."""
    random, layers = np.random.default_rng(seed), chain(layout)
    for hidden, layer in enumerate(layers[:-1]):
        theta = permuted(theta, layers, hidden, random.permutation(layer.weight.shape[0]))
    return theta


def aggregate(
    layout: Layout,
    models: Sequence[Float32],
    weights: Sequence[int] | None = None,
    rounds: int = 0,
    counts: Sequence[Sequence[int]] | None = None,
    tail: Sequence[float] = (),
) -> Float32:
    """Let devices encode, the coordinator match, and a device open; `tail` has one for each."""
    layers = open_layers(layout, rounds)
    start = layers[0].start
    values = length_of(layout) - start
    length = values + outputs_of(layout) + (1 if tail else 0)
    context = crypto.UpdateContext(
        bytes(16), 1, 1, length, 100, 1 << 10, 1.0, tail_length=1 if tail else 0
    )
    with TemporaryDirectory() as name:
        total = MatchedTotal(context, layers, lambda slot: Path(name) / str(slot))
        for slot, model in enumerate(models):
            encoder = plain.encoder(context, slot, None, np.random.default_rng())
            labels = label_shares(layout, () if counts is None else counts[slot])
            more = np.array([tail[slot]] if tail else [], np.float32)
            update = np.concatenate([model[start:], labels, more])
            data = b"".join(encoder.encode(update, 1 if weights is None else weights[slot]))
            (Path(name) / str(slot)).write_bytes(data)
            assert len(data) == total.encoded_update_size
            total.add(slot, io.BytesIO(data))
        encoded = b"".join(total.result())
    assert len(encoded) == total.encoded_sum_size
    mean = plain.open_sum(context, None, total.members, io.BytesIO(encoded)).mean
    assert not mean[values : values + outputs_of(layout)].any()
    if tail:
        assert mean[-1] == pytest.approx(np.average(tail, weights=weights))
    return np.concatenate([models[0][:start], mean[:values]])


def models_of(layout: Layout, count: int, seed: int, noise: float = 0.05) -> list[Float32]:
    """Return models that are nearly alike."""
    random = np.random.default_rng(seed)
    theta = random.standard_normal(length_of(layout))
    size = length_of(layout)
    return [(theta + noise * random.standard_normal(size)).astype(np.float32) for _ in range(count)]


# matching, against the papers


def posterior_cost(others: Float64, mass: float, own: Float64, p: float, ratio: float) -> Float64:
    """PFNM's assignment cost of neurons `own` (L, values) to places (i, neuron), in full."""
    cost = np.zeros((len(others), len(own)))
    for i, n in np.ndindex(cost.shape):
        with_it = float(np.sum((others[i] + p * own[n]) ** 2)) / (ratio + mass + p)
        cost[i, n] = -with_it + float(np.sum(others[i] ** 2)) / (ratio + mass)
    return cost


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(1e-3, 10.0))
def test_a_match_is_the_best_of_all_by_the_full_posterior(
    seed: int, width: int, ratio: float
) -> None:
    """Of two devices, against every permutation and whatever the variances are."""
    neurons = np.random.default_rng(seed).standard_normal((2, width, 3))
    shares = np.array([0.6, 0.4])
    places = match(neurons, shares)
    assert places[0].tolist() == list(range(width))
    cost = posterior_cost(shares[0] * neurons[0], shares[0], neurons[1], shares[1], ratio)
    costs = {
        order: sum(cost[i, n] for i, n in enumerate(order))
        for order in itertools.permutations(range(width))
    }
    assert costs[tuple(places[1].tolist())] <= min(costs.values()) + 1e-9


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 6))
def test_no_device_would_match_the_others_better(seed: int, count: int, width: int) -> None:
    """Where the turns end, each is matched best against all others; every neuron is used once."""
    random = np.random.default_rng(seed)
    neurons, shares = random.standard_normal((count, width, 4)), random.dirichlet(np.ones(count))
    places = match(neurons, shares)
    moved = np.stack([own[order] for own, order in zip(neurons, places, strict=True)])
    total = np.tensordot(shares, moved, 1)
    for device in range(count):
        assert sorted(places[device].tolist()) == list(range(width))
        if device == int(np.argmax(shares)):
            continue
        rest = total - shares[device] * moved[device]
        found = sum(float(rest[i] @ moved[device, i]) for i in range(width))
        best = max(
            sum(float(rest[i] @ neurons[device, n]) for i, n in enumerate(order))
            for order in itertools.permutations(range(min(width, 6)))
        )
        assert found >= best - 1e-9


# whole models


@pytest.mark.parametrize("layout", [MLP, CNN], ids=["mlp", "cnn"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 5))
def test_permuted_copies_are_recovered_exactly(layout: Layout, seed: int, count: int) -> None:
    [theta] = models_of(layout, 1, seed)
    found = aggregate(layout, [theta, *(shuffled(layout, theta, seed + i) for i in range(count))])
    np.testing.assert_allclose(found, theta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", [MLP, CNN], ids=["mlp", "cnn"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), device=st.integers(0, 3))
def test_the_order_of_a_devices_neurons_does_not_matter(
    layout: Layout, seed: int, device: int
) -> None:
    """Where the first of the largest share is permuted, the model is, and computes the same."""
    models = models_of(layout, 4, seed)
    before = aggregate(layout, models, [4, 3, 2, 1])
    models[device] = shuffled(layout, models[device], seed)
    after = aggregate(layout, models, [4, 3, 2, 1])
    if device:
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    rows = rows_for(layout)
    expected = outputs(layout, before, rows)
    np.testing.assert_allclose(outputs(layout, after, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [MLP, CNN], ids=["mlp", "cnn"])
def test_models_that_are_alike_are_averaged_by_their_weights(layout: Layout) -> None:
    """The slow oracle: undo the known orders, then average as FedAvg does, in float64."""
    models, weights = models_of(layout, 4, 7, noise=0.02), [5, 1, 2, 4]
    expected = np.average(np.stack(models).astype(np.float64), axis=0, weights=weights)
    mixed = [models[0], *(shuffled(layout, one, 3) for one in models[1:])]
    np.testing.assert_allclose(aggregate(layout, mixed, weights), expected, rtol=0, atol=1e-6)
    naive = np.average(np.stack(mixed).astype(np.float64), axis=0, weights=weights)
    assert np.abs(naive - expected).max() > 0.1  # what matching is for


@pytest.mark.parametrize("rounds", range(1, 6))
def test_frozen_layers_are_neither_sent_nor_moved(rounds: int) -> None:
    layers = chain(MLP)
    start = layers[rounds % 3].start
    assert matched_parts(MLP, rounds).shared == (slice(start, length_of(MLP)),)
    assert update_length(TERMS, MLP, rounds) == length_of(MLP) - start + 2
    models = models_of(MLP, 3, 1)
    models = [np.concatenate([models[0][:start], one[start:]]) for one in models]
    found = aggregate(MLP, models, rounds=rounds)
    np.testing.assert_array_equal(found[:start], models[0][:start])
    if rounds % 3 == 2:  # only the outputs, which have a meaning
        expected = np.mean(np.stack(models).astype(np.float64), axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [MLP, CNN], ids=["mlp", "cnn"])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.tuples(*[st.integers(0, 9)] * 2), min_size=3, max_size=3),
)
def test_the_last_layer_is_weighted_by_class(
    layout: Layout, seed: int, counts: list[tuple[int, int]]
) -> None:
    """p_jk of the paper; by the weights where nobody has a row of the label."""
    models, weights = models_of(layout, 3, seed, noise=0.01), [5, 2, 1]
    found = tensors_of(layout, aggregate(layout, models, weights, 0, counts, (0.1, 0.2, 0.9)))
    last = chain(layout)[-1]
    for tensor in filter(None, (last.weight, last.bias)):
        rows = [tensors_of(layout, one)[tensor.name].astype(np.float64) for one in models]
        for k in range(2):
            n_k = [count[k] for count in counts]
            p_k = n_k if sum(n_k) else weights
            expected = np.average([one[k] for one in rows], axis=0, weights=p_k)
            np.testing.assert_allclose(found[tensor.name][k], expected, rtol=0, atol=1e-6)
    hidden = chain(layout)[0].weight
    plainly = np.average(
        [tensors_of(layout, one)[hidden.name] for one in models], axis=0, weights=weights
    )
    np.testing.assert_allclose(found[hidden.name], plainly, rtol=0, atol=1e-6)


# a federation


def loss_and_gradient(theta: Float64, x: Float64, y: Float64) -> tuple[float, Float64]:
    """Return those of squared error, by differences: slow, and of nobody's making but ours."""

    def loss(values: Float64) -> float:
        return float(np.square(outputs(MLP, values, x) - y).mean())

    gradient = np.zeros_like(theta)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-5
        gradient[i] = (loss(theta + step) - loss(theta - step)) / 2e-5
    return loss(theta), gradient


def test_rounds_lead_a_federation_to_what_all_of_its_data_say() -> None:
    """Three devices with inputs of their own, and one teacher; four cycles of three layers."""
    random = np.random.default_rng(11)
    teacher = random.standard_normal(length_of(MLP))
    inputs = [random.standard_normal((24, 3)) + shift for shift in (-1.0, 0.0, 1.0)]
    data = [(x, outputs(MLP, teacher, x)) for x in inputs]
    everything = np.concatenate(inputs), np.concatenate([y for _, y in data])
    terms = terms_of(Strategy.FED_MA, local_steps=12, learning_rate=0.05)
    run = algorithm(terms, MLP)
    state = ServerState((0.5 * random.standard_normal(length_of(MLP))).astype(np.float32))
    begun, _ = loss_and_gradient(state.theta.astype(np.float64), *everything)
    for _ in range(12):
        parts = parts_of(terms, MLP, state.rounds)
        sent = []
        for x, y in data:
            local, theta = LocalSteps(state.theta, terms, 12, None, parts), state.theta.copy()
            for _ in range(12):
                _, gradient = loss_and_gradient(theta.astype(np.float64), x, y)
                local.step(theta, gradient.astype(np.float32))
            update = LocalUpdate(theta - state.theta, 24, 0.0)
            sent.append(outgoing(terms, state, (), update, MLP).values)
        start = parts.shared[0].start
        whole = [np.concatenate([state.theta[:start], one[:-2]]) for one in sent]
        for one, values in zip(whole, sent, strict=True):
            assert len(values) == update_length(terms, MLP, state.rounds)
            assert np.isfinite(one).all()
        mean = np.append(aggregate(MLP, whole, rounds=state.rounds)[start:], np.zeros(2))
        before = state.theta
        state = run.apply(state, mean.astype(np.float32), 3)
        np.testing.assert_array_equal(state.theta[:start], before[:start])
    ended, _ = loss_and_gradient(state.theta.astype(np.float64), *everything)
    assert ended < begun / 10


# what is refused


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (layout_of(("0.weight", (4, 3)), ("0.bias", (4,))), "two layers at least"),
        (layout_of(("0.weight", (4, 1, 3, 3)), ("1.weight", (4,))), "1.weight"),  # a norm
        (layout_of(("0.weight", (4, 3)), ("2.weight", (2, 5))), "2.weight"),
        (layout_of(("0.weight", (4, 3)), ("2.weight", (2, 8))), "2.weight"),  # nothing to flatten
        (layout_of(("0.weight", (4, 1, 3, 3)), ("4.weight", (8, 2, 3, 3))), "4.weight"),  # groups
        (layout_of(("0.bias", (4,)), ("0.weight", (4, 3))), "0.bias"),
        (layout_of(("0.weight", (4, 3)), ("0.bias", (4,)), ("0.more", (4,))), "0.more"),
        (layout_of(("scale", ()), ("0.weight", (4, 3))), "scale"),
        (layout_of(("q.lora_A", (2, 3)), role=Role.LORA_A), "q.lora_A"),
    ],
)
def test_what_is_no_chain_is_refused_by_its_tensors_name(layout: Layout, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        parts_of(TERMS, layout, 0)
    assert "use fed_avg" in refused.value.subject


@pytest.mark.parametrize(
    "wrong",
    [{"lora": LoraRule.FFA}, {"personal": Personal.FEDPER}, {"server_learning_rate": 0.5}],
)
def test_terms_that_matching_cannot_have_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused, match="FED_MA"):
        LocalTraining(strategy=Strategy.FED_MA, **wrong)  # type: ignore[arg-type]


def test_labels_are_counted_where_rows_have_one() -> None:
    rows = LabelledArrays({"x": np.zeros((6, 2), np.float32)}, np.array([1, 0, 1, 1, 1, 0]))
    inputs = (ArrayInput("x", (2,)),)
    assert label_counts(ArrayLearning(inputs, ("a", "b", "c")), rows) == (2, 4, 0)
    values = LabelledArrays(rows.arrays, np.zeros((6, 2), np.float32))
    assert label_counts(ArrayLearning(inputs, values=2), values) == ()
    assert label_shares(MLP, (2, 4)).tolist() == [2.0**-23, 2.0**-22]
    assert not label_shares(MLP, (2, 4, 0)).any()  # outputs that are no labels


def test_terms_travel_and_send_parts() -> None:
    assert LocalTraining.from_message(TERMS.to_message()) == TERMS
    assert not sends_everything(TERMS)
