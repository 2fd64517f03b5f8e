"""Cutting a data set into batches: nothing is lost, nothing twice, limits kept."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.batches import (
    ClassifiedTexts,
    TokenisedTexts,
    micro_batches,
    shuffled_batches,
    training_batches,
)

lengths_of_texts = st.lists(st.integers(1, 40), min_size=1, max_size=300)


@given(lengths_of_texts, st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_an_epoch_holds_every_text_once(lengths: list[int], batch_size: int, seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    batches = list(shuffled_batches(np.array(lengths), batch_size, generator))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(map(len, batches)) <= batch_size


def test_the_order_is_the_seeds_and_differs_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100)

    def epochs(seed: int) -> list[list[int]]:
        batches = list(training_batches(lengths, 4, 2, seed, 0))
        return [np.concatenate(batches[half : half + 25]).tolist() for half in (0, 25)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    assert epochs(1)[0] != epochs(1)[1]
    assert epochs(1)[1] != epochs(2)[0]


@given(
    lengths_of_texts, st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**64 - 1), st.data()
)
def test_a_training_goes_on_with_the_batches_that_are_left(
    lengths: list[int], batch_size: int, epochs: int, seed: int, data: st.DataObject
) -> None:
    whole = list(training_batches(np.array(lengths), batch_size, epochs, seed, 0))
    done = data.draw(st.integers(0, len(whole)))
    rest = list(training_batches(np.array(lengths), batch_size, epochs, seed, done))
    assert len(whole) == epochs * -(-len(lengths) // batch_size)
    assert [rows.tolist() for rows in rest] == [rows.tolist() for rows in whole[done:]]


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(0, 1), min_size=6, max_size=6),
)
def test_samples_have_one_digest_exactly_when_they_are_equal(
    first: list[list[int]], second: list[list[int]], labels: list[int]
) -> None:
    one = [(ids, labels[i]) for i, ids in enumerate(first)]
    other = [(ids, labels[-1 - i]) for i, ids in enumerate(second)]
    digests = [
        ClassifiedTexts(
            TokenisedTexts.from_ids(ids for ids, _ in rows),
            np.array([label for _, label in rows]),
            pad_token_id=0,
        ).sha256
        for rows in (one, other)
    ]
    assert (digests[0] == digests[1]) == (one == other)


def test_long_texts_come_at_any_time() -> None:
    """Grouping by length must not turn an epoch into short texts first, long ones last."""
    lengths = np.arange(1, 1025)
    positions = np.zeros(1024)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        positions[np.concatenate(list(shuffled_batches(lengths, 4, generator)))] += np.arange(1024)
    assert abs(np.corrcoef(positions, lengths)[0, 1]) < 0.15


@given(lengths_of_texts, st.integers(1, 20), st.integers(1, 100))
def test_micro_batches_partition_their_rows_within_the_limits(
    lengths: list[int], max_rows: int, max_tokens: int
) -> None:
    of_all = np.array(lengths)
    rows = np.arange(0, len(lengths), 2)
    parts = list(micro_batches(rows, of_all, max_rows, max_tokens))
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    for part in parts:
        assert 1 <= len(part) <= max_rows
        assert len(part) == 1 or len(part) * of_all[part].max() <= max_tokens


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=9))
def test_padding_is_masked_and_nothing_else_is(texts: list[list[int]]) -> None:
    rows = np.arange(len(texts))[::-1]
    input_ids, mask = TokenisedTexts.from_ids(texts).padded(rows, pad_token_id=0)
    longest = max(map(len, texts))
    for row, ids, present in zip(rows, input_ids.tolist(), mask.tolist(), strict=True):
        text = texts[row]
        assert ids == text + [0] * (longest - len(text))
        assert present == [1] * len(text) + [0] * (longest - len(text))
