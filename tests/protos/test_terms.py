"""The terms of a run: within their limits they travel unchanged, outside they are refused."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import Reason, Refused
from fedloom.terms import (
    MAX_BATCH_SIZE,
    MAX_CAPACITY,
    MAX_EPOCHS,
    MAX_WEIGHT_CLASS,
    UPDATE_BITS,
    Encoding,
    LocalTraining,
    Optimizer,
    Protection,
    Strategy,
    clip_of,
    weight_class,
)
from fedloom.v1 import control_pb2

_rate = st.floats(0, 1e6, allow_nan=False)


@st.composite
def trainings(draw: st.DrawFn) -> LocalTraining:
    """Any terms of local training within the limits."""
    strategy = draw(st.sampled_from(Strategy))
    return LocalTraining(
        strategy=strategy,
        optimizer=draw(st.sampled_from(Optimizer)),
        epochs=draw(st.integers(1, MAX_EPOCHS)),
        batch_size=draw(st.integers(1, MAX_BATCH_SIZE)),
        learning_rate=draw(st.floats(0, 1e6, exclude_min=True)),
        weight_decay=draw(_rate),
        momentum=draw(st.floats(0, 1, exclude_max=True)),
        proximal_mu=draw(_rate) if strategy is Strategy.FED_PROX else 0.0,
        server_learning_rate=draw(_rate),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


encodings = st.builds(
    Encoding,
    protection=st.sampled_from(Protection),
    capacity=st.integers(1, MAX_CAPACITY),
    clip=st.floats(0, 1e6),
    update_bits=st.sampled_from(UPDATE_BITS),
)


@given(trainings())
def test_training_travels_unchanged(training: LocalTraining) -> None:
    data = training.to_message().SerializeToString()
    assert LocalTraining.from_message(control_pb2.LocalTraining.FromString(data)) == training


@given(encodings)
def test_encoding_travels_unchanged(encoding: Encoding) -> None:
    data = encoding.to_message().SerializeToString()
    assert Encoding.from_message(control_pb2.Encoding.FromString(data)) == encoding


OUTSIDE_TRAINING = [
    ("epochs", 0),
    ("epochs", MAX_EPOCHS + 1),
    ("batch_size", 0),
    ("batch_size", MAX_BATCH_SIZE + 1),
    ("learning_rate", 0.0),
    *(
        (name, value)
        for name in (
            "learning_rate",
            "weight_decay",
            "momentum",
            "proximal_mu",
            "server_learning_rate",
        )
        for value in (-1e-9, math.nan, math.inf)
    ),
    ("momentum", 1.0),
    ("strategy", 0),
    ("strategy", 99),
    ("optimizer", 0),
    ("optimizer", 99),
]


@pytest.mark.parametrize(("field", "value"), OUTSIDE_TRAINING)
def test_training_outside_the_limits_is_refused(field: str, value: float) -> None:
    message = LocalTraining(strategy=Strategy.FED_PROX).to_message()
    assert LocalTraining.from_message(message)
    setattr(message, field, value)
    with pytest.raises(Refused) as caught:
        LocalTraining.from_message(message)
    assert caught.value.reason is Reason.MALFORMED


def test_a_proximal_term_needs_fedprox() -> None:
    assert LocalTraining(strategy=Strategy.FED_PROX, proximal_mu=0.1).proximal_mu == 0.1
    with pytest.raises(Refused, match="proximal_mu 0"):
        LocalTraining(strategy=Strategy.FED_AVG, proximal_mu=0.1)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_is_64_bits(seed: int) -> None:
    with pytest.raises(Refused, match="seed"):
        LocalTraining(seed=seed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protection", 0),
        ("protection", 99),
        ("capacity", 0),
        ("capacity", MAX_CAPACITY + 1),
        ("clip", -1.0),
        ("clip", math.nan),
        ("clip", math.inf),
        ("update_bits", 0),
        ("update_bits", 15),
    ],
)
def test_encoding_outside_the_limits_is_refused(field: str, value: float) -> None:
    message = Encoding(Protection.ENCRYPTED).to_message()
    assert Encoding.from_message(message)
    setattr(message, field, value)
    with pytest.raises(Refused) as caught:
        Encoding.from_message(message)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "empty",
    [
        lambda: LocalTraining.from_message(control_pb2.LocalTraining()),
        lambda: Encoding.from_message(control_pb2.Encoding()),
    ],
    ids=["training", "encoding"],
)
def test_a_message_left_empty_is_refused(empty: Callable[[], object]) -> None:
    with pytest.raises(Refused):
        empty()


@given(encodings, trainings(), st.integers(1, 2**MAX_WEIGHT_CLASS))
def test_a_clip_that_is_not_stated_follows_from_the_terms(
    encoding: Encoding, training: LocalTraining, weight_cap: int
) -> None:
    derived = (
        1.25
        * training.learning_rate
        * (training.epochs * math.ceil(weight_cap / training.batch_size))
    )
    unstated = replace(encoding, clip=0.0)
    if training.optimizer is Optimizer.ADAMW:
        assert clip_of(unstated, training, weight_cap) == derived
    else:
        with pytest.raises(Refused, match="MALFORMED"):
            clip_of(unstated, training, weight_cap)
    stated = replace(encoding, clip=0.5)
    assert clip_of(stated, training, weight_cap) == 0.5


@given(st.integers(1, 2**MAX_WEIGHT_CLASS) | st.sampled_from([2**c for c in range(25)]))
def test_a_weight_class_is_the_smallest_power_of_two_that_holds_the_samples(samples: int) -> None:
    found = weight_class(samples)
    assert 0 <= found <= MAX_WEIGHT_CLASS
    assert 2.0 ** (found - 1) < samples <= 2**found


@pytest.mark.parametrize("samples", [-1, 0, 2**MAX_WEIGHT_CLASS + 1])
def test_no_samples_and_too_many_are_refused(samples: int) -> None:
    with pytest.raises(Refused) as caught:
        weight_class(samples)
    assert caught.value.reason is Reason.WEIGHT_OUT_OF_RANGE
