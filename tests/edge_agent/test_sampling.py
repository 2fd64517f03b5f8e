"""Sampling: what may be drawn, how often, and that a seed repeats it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_agent.sampling import Sampler, Sampling, distribution
from fedloom.errors import Reason, Refused

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
TEMPERATURES = st.floats(0.05, 5)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@given(LOGITS, TEMPERATURES, st.floats(0.01, 0.99))
def test_top_p_leaves_the_smallest_set_that_reaches_it(
    logits: np.ndarray, temperature: float, top_p: float
) -> None:
    tokens, probabilities = distribution(logits, Sampling(temperature, top_p=top_p))
    whole = softmax(logits, temperature)
    kept = whole[tokens]
    assert kept.sum() >= top_p - 1e-9
    assert kept[:-1].sum() < top_p + 1e-9  # without its least probable token it is too small
    others = np.delete(whole, tokens)
    assert others.size == 0 or others.max() <= kept.min() + 1e-12
    np.testing.assert_allclose(probabilities, kept / kept.sum(), rtol=1e-9)


@given(LOGITS, TEMPERATURES, st.integers(1, 50))
def test_top_k_leaves_the_k_most_probable(
    logits: np.ndarray, temperature: float, top_k: int
) -> None:
    tokens, probabilities = distribution(logits, Sampling(temperature, top_k=top_k))
    assert len(set(tokens.tolist())) == len(tokens) == min(top_k, len(logits))
    others = np.delete(logits, tokens)
    assert others.size == 0 or others.max() <= logits[tokens].min()
    assert probabilities.sum() == pytest.approx(1)
    assert (np.diff(probabilities) <= 0).all()


@given(LOGITS, st.integers(0, 2**64 - 1))
def test_a_temperature_near_nought_is_greedy(logits: np.ndarray, seed: int) -> None:
    greedy = Sampler(Sampling()).choose(logits)
    assert greedy == int(logits.argmax())
    drawn = Sampler(Sampling(1e-9, seed=seed)).choose(logits)
    assert logits[drawn] >= logits[greedy] - 1e-6  # what is nearly a tie may fall either way
    assert Sampler(Sampling(3.0, top_k=1, seed=seed)).choose(logits) == greedy


@given(LOGITS, st.floats(0.01, 1.0), st.integers(0, 2**64 - 1))
def test_a_seed_repeats_what_was_drawn(logits: np.ndarray, top_p: float, seed: int) -> None:
    first, second = (Sampler(Sampling(1.5, top_p=top_p, seed=seed)) for _ in range(2))
    assert [first.choose(logits) for _ in range(8)] == [second.choose(logits) for _ in range(8)]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(1.0, seed=11))
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=4)
    # Four standard deviations of a binomial.
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.15, 0.05], atol=4 * 0.5 / 20_000**0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(Refused) as caught:
        Sampling(**values)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(Refused):
        Sampler(Sampling(1.0)).choose(np.array([0, bad, 1], np.float32))
