"""Qualities in, their weighted mean out, also through a protection's own arithmetic."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import crypto
from fedloom.errors import Reason, Refused
from fedloom.quality import (
    Counts,
    Evaluation,
    EvaluationTerms,
    Metric,
    Quality,
    Report,
    local_quality,
    loss_bound,
    mean_quality,
    metrics_of,
    named,
    tail_length,
    tail_shares,
)
from fedloom.tasks import (
    ArrayInput,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)

LABELS = ("a", "b", "c", "d", "e")
INPUTS = (ArrayInput("x", (2,)),)
TASKS: tuple[Task, ...] = (
    TextClassification(LABELS, 16, 0),
    TokenClassification(("O", "B-x", "I-x"), 16, 0),
    CausalLanguageModelling(16, 0, 32_000, 1, 1, 1),
    ArrayLearning(INPUTS, LABELS),
    ArrayLearning(INPUTS, values=2),
)
MEAN, CLIP = EvaluationTerms(), 0.37


def classes_of(task: Task) -> int:
    return (tail_length(MEAN, task) - 4) // 3


@st.composite
def evaluations(draw: st.DrawFn, task: Task) -> Evaluation | None:
    if draw(st.integers(0, 3)) == 0:
        return None
    rows, classes = draw(st.integers(1, 500)), classes_of(task)
    cells = draw(st.lists(st.integers(0, rows), min_size=3 * classes, max_size=3 * classes))
    counts = Counts(*(tuple(cells[i::3]) for i in range(3))) if classes else Counts()
    loss, error = draw(st.floats(0, 3.9)), draw(st.floats(0, 3.9))
    return Evaluation(rows, draw(st.integers(0, rows)), loss, counts, error)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Task, list[tuple[Evaluation | None, float, int]]]:
    task = draw(st.sampled_from(TASKS))
    member = st.tuples(evaluations(task), st.floats(0, 3.9), st.integers(1, 1000))
    return task, draw(st.lists(member, min_size=1, max_size=5))


def averaged(task: Task, members: list[tuple[Evaluation | None, float, int]]) -> list[float]:
    """Return the weighted mean of the tails, in float64."""
    tails = [tail_shares(MEAN, task, loss, found) for found, loss, _ in members]
    weights = [weight for _, _, weight in members]
    return np.average(np.array(tails), axis=0, weights=weights).tolist()


@given(cohorts())
def test_the_opened_mean_is_the_weighted_mean_of_those_who_measured(cohort) -> None:
    task, members = cohort
    tail = [CLIP * value for value in averaged(task, members)]
    assert len(tail) == tail_length(MEAN, task)
    found = mean_quality(MEAN, task, tail, CLIP)
    assert found is not None
    all_weights = sum(weight for _, _, weight in members)
    expected = sum(loss * weight for _, loss, weight in members) / all_weights
    assert found.training_loss == pytest.approx(expected, abs=1e-9)
    measured = [(one, weight) for one, _, weight in members if one is not None]
    if not measured:
        assert found == Quality(training_loss=found.training_loss)
        return
    weights = [weight for _, weight in measured]
    assert found.share == pytest.approx(sum(weights) / all_weights)
    for name in ("loss", "accuracy", "mean_squared_error"):
        each = [getattr(local_quality(one, task), name) for one, _ in measured]
        if each[0] is None:
            assert getattr(found, name) is None
        else:
            assert getattr(found, name) == pytest.approx(np.average(each, weights=weights))


def test_macro_f1_is_that_of_all_rows_together_where_agents_weigh_as_their_rows() -> None:
    rng, task = np.random.default_rng(0), TASKS[0]
    members, truths, guesses = [], [], []
    for rows in (3, 40, 200):
        truth, guess = rng.integers(0, 4, rows), rng.integers(0, 4, rows)  # nobody meets "e"
        right = truth == guess
        counts = Counts(
            *(
                tuple(np.bincount(part, minlength=5).tolist())
                for part in (truth[right], guess[~right], truth[~right])
            )
        )
        members.append((Evaluation(rows, int(right.sum()), 0.5, counts), 0.5, rows))
        truths.append(truth)
        guesses.append(guess)
        alone = local_quality(members[-1][0], task).f1
        assert alone == pytest.approx(f1_score(truth, guess, average="macro"))
    found = mean_quality(MEAN, task, averaged(task, members), 1.0)
    assert found is not None
    expected = f1_score(np.concatenate(truths), np.concatenate(guesses), average="macro")
    assert found.f1 == pytest.approx(expected)


@pytest.mark.parametrize(("capacity", "bits"), [(4, 16), (100, 16), (100, 8)])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_a_protection_opens_is_as_precise_as_is_stated(capacity: int, bits: int, data) -> None:
    task, members = data.draw(cohorts())
    members = members[:4]
    context = crypto.UpdateContext(
        *(bytes(16), 1, 1, 3 + tail_length(MEAN, task), capacity, 1024, CLIP, bits),
        tail_length=tail_length(MEAN, task),
    )
    encrypted, key = crypto.protection("encrypted"), crypto.RunKey(bytes(32))
    total = encrypted.accumulator(context)
    for slot, (found, loss, weight) in enumerate(members):
        shares = np.array(tail_shares(MEAN, task, loss, found), np.float32)
        update = np.concatenate([np.full(3, 1e-3, np.float32), np.float32(CLIP) * shares])
        encoder = encrypted.encoder(context, slot, key, np.random.default_rng(slot))
        total.add(slot, io.BytesIO(b"".join(encoder.encode(update, weight))))
    opened = encrypted.open_sum(context, key, total.members, io.BytesIO(b"".join(total.result())))
    assert opened.saturated == 0
    exact = np.array(averaged(task, members))
    levels = crypto.BfvParameters.derive(context, "encrypted").half_levels
    off = np.abs(opened.mean[3:] / CLIP - exact)
    weights = sum(weight for _, _, weight in members)
    assert off.max() <= len(members) * 1024 / (weights * levels) + 1e-6
    assert (opened.mean[3:][exact == 0] == 0).all()


def test_a_loss_beyond_its_bound_counts_as_the_bound() -> None:
    for task in TASKS:
        terms = replace(MEAN, loss_bound=2.0)
        assert (loss_bound(MEAN, task), loss_bound(terms, task)) >= (4.0, 2.0)
        diverged = Evaluation(
            10, 0, 1e30, Counts(*((0,) * classes_of(task),) * 3), mean_squared_error=1e30
        )
        found = mean_quality(terms, task, tail_shares(terms, task, 1e30, diverged), 1.0)
        assert found is not None
        assert (found.training_loss, found.loss) == (2.0, 2.0)


def test_a_guess_among_all_classes_is_within_the_bound() -> None:
    for task in TASKS[:4]:
        classes = getattr(task, "vocabulary_size", None) or len(task.labels)  # type: ignore[union-attr]
        assert np.log(classes) < loss_bound(MEAN, task)


@pytest.mark.parametrize("report", [Report.EACH, Report.NONE])
def test_only_a_mean_makes_updates_longer(report: Report) -> None:
    terms = EvaluationTerms(report)
    for task in TASKS:
        assert tail_length(terms, task) == 0
        assert tail_shares(terms, task, 1.0, None) == []
        assert mean_quality(terms, task, [], 1.0) is None


@given(cohorts())
def test_a_quality_travels_to_the_bit_and_has_names(cohort) -> None:
    task, members = cohort
    found = mean_quality(MEAN, task, averaged(task, members), 1.0)
    assert found is not None
    assert Quality.from_message(found.to_message()) == found
    names = {metric.value for metric in metrics_of(task)}
    assert set(named(found, task)) == (names if found.share else set())


@pytest.mark.parametrize(
    "wrong",
    [
        Quality(share=1.5),
        Quality(accuracy=-0.1),
        Quality(f1=float("nan")),
        Quality(loss=float("inf")),
        Quality(mean_squared_error=-1.0),
    ],
)
def test_a_quality_that_cannot_be_is_refused(wrong: Quality) -> None:
    with pytest.raises(Refused) as refused:
        Quality.from_message(wrong.to_message())
    assert refused.value.reason is Reason.MALFORMED


def test_terms_travel_and_wrong_ones_are_refused() -> None:
    for terms in (MEAN, EvaluationTerms(Report.EACH, False, 7.0)):
        assert EvaluationTerms.from_message(terms.to_message()) == terms
    for bound in (-1.0, float("nan"), 1e10):
        with pytest.raises(Refused, match="loss_bound"):
            EvaluationTerms(loss_bound=bound)
    message = MEAN.to_message()
    message.report = 0
    with pytest.raises(Refused, match="QualityReport"):
        EvaluationTerms.from_message(message)


def test_perplexity_is_of_the_mean_loss() -> None:
    assert Quality(loss=2.0).value(Metric.PERPLEXITY) == pytest.approx(np.exp(2.0))
