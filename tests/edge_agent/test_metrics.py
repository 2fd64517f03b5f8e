"""Counts from labels and logits, against scikit-learn and seqeval."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score, mean_squared_error

from edge_agent.metrics import Tags, Tally
from fedloom.errors import Reason, Refused
from fedloom.quality import local_quality
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayInput,
    ArrayLearning,
    Task,
    TextClassification,
    TokenClassification,
)

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC-x", "I-MISC-x")
BIOES = (*BIO, "E-PER", "S-PER", "E-LOC", "S-LOC")


def one_hot(predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return logits whose largest is at the prediction."""
    return np.eye(classes, dtype=np.float32)[predicted]


def tallied(task: Task, labels: np.ndarray, logits: np.ndarray, batch: int = 7) -> Tally:
    tally = Tally(task)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        tally.add_logits(labels[rows], logits[rows])
    tally.add_sums(1.0, float(len(labels)), 0.0)
    return tally


@given(st.lists(st.sampled_from(BIOES), max_size=12))
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    numbers = np.array([BIOES.index(tag) for tag in tags], np.int64)
    kinds = sorted({tag[2:] for tag in BIOES if tag != "O"})
    found = {(kinds[kind], first, last) for kind, first, last in Tags(BIOES).entities(numbers)}
    assert found == set(get_entities(tags))


_SENTENCES = st.lists(
    st.lists(st.tuples(st.sampled_from(BIO), st.sampled_from(BIO)), min_size=1, max_size=8),
    min_size=1,
    max_size=20,
)


@given(_SENTENCES, st.integers(0, 2**32))
def test_entity_f1_is_that_of_seqeval(sentences, seed: int) -> None:
    """Subwords and padding are not labelled, and lie between the words."""
    rng = np.random.default_rng(seed)
    shape = (len(sentences), 20)
    labels, predicted = np.full(shape, IGNORED_LABEL), rng.integers(0, len(BIO), shape)
    for row, sentence in enumerate(sentences):
        places = np.sort(rng.choice(20, len(sentence), replace=False))
        labels[row, places] = [BIO.index(truth) for truth, _ in sentence]
        predicted[row, places] = [BIO.index(guess) for _, guess in sentence]
    task = TokenClassification(BIO, 32, 0)
    found = tallied(task, labels, one_hot(predicted, len(BIO))).evaluation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sentences without entities
        expected = entity_f1(
            [[truth for truth, _ in sentence] for sentence in sentences],
            [[guess for _, guess in sentence] for sentence in sentences],
        )
    assert local_quality(found, task).f1 == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_macro_f1_is_that_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    truth, guess = np.array(rows).T
    for task in (
        TextClassification(("a", "b", "c", "d"), 16, 0),
        ArrayLearning((ArrayInput("x", ()),), ("a", "b", "c", "d")),
    ):
        found = tallied(task, truth, one_hot(guess, 4)).evaluation()
        expected = f1_score(truth, guess, average="macro")
        assert local_quality(found, task).f1 == pytest.approx(expected)
        assert sum(found.counts.right) == np.count_nonzero(truth == guess)


def test_squared_errors_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth, guess = rng.normal(size=(2, 50, 3)).astype(np.float32)
    task = ArrayLearning((ArrayInput("x", ()),), values=3)
    found = local_quality(tallied(task, truth, guess).evaluation(), task)
    assert found.mean_squared_error == pytest.approx(mean_squared_error(truth, guess))
    assert (found.accuracy, found.f1) == (None, None)


@pytest.mark.parametrize(("loss", "weight"), [(np.nan, 3.0), (np.inf, 3.0), (1.0, 0.0)])
def test_a_model_that_diverged_has_no_quality(loss: float, weight: float) -> None:
    tally = Tally(TextClassification(("a", "b"), 16, 0))
    tally.add_sums(loss, weight, 0.0)
    with pytest.raises(Refused) as refused:
        tally.evaluation()
    assert refused.value.reason is Reason.TRAINING_FAILED
