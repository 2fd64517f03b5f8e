"""Every engine on toy plans: it learns, exactly and reproducibly, and says why when it cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.checkpoints import Checkpoint
from edge_agent.data import DataSource
from edge_agent.engine import Engine
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import EVAL_GRAPH, TRAIN_GRAPH
from fedloom.strategies.parts import Parts
from fedloom.tasks import TextClassification
from fedloom.terms import LocalTraining, Optimizer, Strategy
from tests.edge_agent.toy import Toy, Unkept
from tests.engines.conftest import Kind
from tests.engines.toys import TASK_TOYS, GivenExamples

TERMS = LocalTraining(epochs=3, batch_size=16, learning_rate=0.05)


def _quiet(_: float) -> None:
    pass


def _train(engine: Engine, toy, terms: LocalTraining = TERMS, seed: int = 5) -> np.ndarray:
    return engine.train(toy.theta, terms, seed, _quiet, Unkept()).delta


def _refusal(kind: Kind, toy, train_data: DataSource) -> Refused:
    with pytest.raises(Refused) as caught:
        _train(kind.make(toy.folder, toy.plan, train_data), toy)
    return caught.value


def _require_same(kind: Kind, found: np.ndarray, expected: np.ndarray) -> None:
    if kind.repeats:
        np.testing.assert_array_equal(found, expected)
    else:
        assert _relative(found, expected) < 1e-5


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_it_learns_the_toy_problem(engine: Engine, toy) -> None:
    before = engine.evaluate(toy.theta)
    start = toy.theta.copy()
    update = engine.train(toy.theta, TERMS, 0, _quiet, Unkept())
    after = engine.evaluate(toy.theta + update.delta)
    assert before is not None
    assert after is not None
    assert before.count == after.count == 100
    assert before.correct < 60
    assert after.correct > 90
    assert after.mean_loss < before.mean_loss
    assert update.samples == 200
    assert 0 < update.mean_loss < before.mean_loss
    np.testing.assert_array_equal(toy.theta, start)


def test_without_held_out_data_there_is_no_evaluation(
    kind: Kind, toy, train_data: DataSource
) -> None:
    assert kind.make(toy.folder, toy.plan, train_data).evaluate(toy.theta) is None


def test_one_plain_step_over_all_is_the_gradient_of_the_evaluated_loss(
    kind: Kind, toy, train_data: DataSource
) -> None:
    """Independent oracle: the slope of evaluate's mean loss, which numpy computes from logits."""
    engine = kind.make(toy.folder, toy.plan, train_data, train_data)
    terms = replace(TERMS, epochs=1, batch_size=200, learning_rate=1.0, optimizer=Optimizer.SGD)
    gradient = -_train(engine, toy, terms).astype(np.float64)
    for index in (0, 40, 96, 98):
        nudge = np.zeros_like(toy.theta)
        nudge[index] = 0.01
        losses = [engine.evaluate(toy.theta + sign * nudge) for sign in (1, -1)]
        assert losses[0] is not None
        assert losses[1] is not None
        slope = (losses[0].mean_loss - losses[1].mean_loss) / 0.02
        assert gradient[index] == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_micro_batches_change_nothing_but_rounding(
    kind: Kind, engine: Engine, toy, train_data: DataSource, micro_batch: int
) -> None:
    terms = replace(TERMS, optimizer=Optimizer.SGD, learning_rate=0.1, momentum=0.9)
    other = kind.make(toy.folder, toy.plan, train_data, micro_batch=micro_batch)
    whole = _train(engine, toy, terms)
    assert np.linalg.norm(_train(other, toy, terms) - whole) < 1e-5 * np.linalg.norm(whole)


def test_the_seed_fixes_every_bit_of_the_update(kind: Kind, engine: Engine, toy) -> None:
    first = _train(engine, toy, seed=11)
    _require_same(kind, _train(engine, toy, seed=11), first)
    assert not np.array_equal(first, _train(engine, toy, seed=12))


def test_fedprox_keeps_the_update_smaller(engine: Engine, toy) -> None:
    terms = replace(TERMS, optimizer=Optimizer.SGD, learning_rate=0.1)
    free = np.linalg.norm(_train(engine, toy, terms))
    held = replace(terms, strategy=Strategy.FED_PROX, proximal_mu=1.0)
    assert np.linalg.norm(_train(engine, toy, held)) < 0.9 * free
    loose = replace(terms, strategy=Strategy.FED_PROX, proximal_mu=0.0)
    assert np.linalg.norm(_train(engine, toy, loose)) == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_parts_that_rest_do_not_move_and_the_others_learn(
    engine: Engine, toy, optimizer: Optimizer
) -> None:
    terms = replace(TERMS, optimizer=optimizer, weight_decay=0.1)
    parts = Parts((slice(0, 40),), (slice(90, 99),), (slice(40, 90),))
    start = toy.theta + np.float32(0.25)
    delta = engine.train(start, terms, 5, _quiet, Unkept(), None, parts).delta
    assert not delta[40:90].any()
    assert delta[:40].all()
    assert delta[90:].all()


def test_data_are_read_once(kind: Kind, engine: Engine, toy, train_data: DataSource) -> None:
    first = _train(engine, toy)
    train_data.path.unlink()
    _require_same(kind, _train(engine, toy), first)


def test_progress_rises_to_one_with_every_step(engine: Engine, toy) -> None:
    seen: list[float] = []
    engine.train(toy.theta, TERMS, 0, seen.append, Unkept())
    assert len(seen) == 3 * 13  # ceil(200 / 16) steps in each of 3 epochs
    assert seen == sorted(set(seen))
    assert seen[-1] == 1


def test_what_progress_raises_interrupts_the_training(engine: Engine, toy) -> None:
    class EnoughError(Exception):
        pass

    calls: list[float] = []

    def stop(share: float) -> None:
        calls.append(share)
        raise EnoughError

    with pytest.raises(EnoughError):
        engine.train(toy.theta, TERMS, 0, stop, Unkept())
    assert len(calls) == 1
    assert _train(engine, toy).any()


def test_texts_are_cut_to_the_tasks_length(
    kind: Kind, make_toy: Callable[..., Toy], write_csv: Callable[..., DataSource]
) -> None:
    """Words beyond max_tokens, special tokens included, make no difference."""
    toy = make_toy(max_tokens=4)
    short = write_csv("short.csv", [("lamp dim", "lights"), ("song play", "music")])
    long = write_csv("long.csv", [("lamp dim rain", "lights"), ("song play storm me", "music")])
    deltas = [_train(kind.make(toy.folder, toy.plan, source), toy) for source in (short, long)]
    _require_same(kind, deltas[0], deltas[1])


def test_broken_rows_are_left_out_and_counted(
    kind: Kind, toy, write_csv: Callable[..., DataSource]
) -> None:
    good = [("lamp dim", "lights"), ("song play", "music")]
    engine = kind.make(toy.folder, toy.plan, write_csv("a.csv", [*good, ("", "music")]))
    assert engine.train(toy.theta, TERMS, 0, _quiet, Unkept()).samples == 2
    assert engine.broken_rows == 1


def test_the_datas_refusals_reach_the_caller(
    kind: Kind, toy, write_csv: Callable[..., DataSource]
) -> None:
    refused = _refusal(kind, toy, write_csv("a.csv", [("lamp", "lights"), ("rain", "wether")]))
    assert refused.reason is Reason.DATA_LABEL_UNKNOWN


# A loss that is finite with a gradient that is not: ONNX Runtime's is written down in its graph.
BAD_GRADIENT = {
    TRAIN_GRAPH: ("probability = Exp(log_probability)", "probability = Log(logits)"),
    EVAL_GRAPH: (
        "loss_sum = Neg(log_sum)",
        "gap = Sub(log_sum, log_sum)\n root = Sqrt(gap)\n less = Sub(root, log_sum)\n"
        "loss_sum = Identity(less)",
    ),
}
NO_GRADIENT = {
    TRAIN_GRAPH: ("error = Sub(probability, target)", "error = Sub(target, target)"),
    EVAL_GRAPH: (
        "log_sum = ReduceSum<keepdims = 0>(weighted_log)",
        "kept = Sub(weighted_log, weighted_log)\n log_sum = ReduceSum<keepdims = 0>(kept)",
    ),
}


@pytest.mark.parametrize(
    "edit",
    [
        None,
        ("loss_sum = Neg(log_sum)", "loss_sum = Sqrt(log_sum)"),
        (
            "weight_sum = ReduceSum<keepdims = 0>(sample_weight)",
            "weight_sum = Sub(loss_sum, loss_sum)",
        ),
    ],
    ids=["gradient", "loss", "weight"],
)
def test_divergence_is_a_refusal_that_names_the_step(
    kind: Kind,
    make_toy: Callable[..., Toy],
    train_data: DataSource,
    edit: tuple[str, str] | None,
) -> None:
    toy = make_toy(edit=edit or BAD_GRADIENT[kind.graph])
    refused = _refusal(kind, toy, train_data)
    assert refused.reason is Reason.TRAINING_FAILED
    assert "step 1" in refused.subject


def test_an_update_that_overflows_is_refused(engine: Engine, toy) -> None:
    terms = replace(TERMS, optimizer=Optimizer.SGD, learning_rate=1e38, epochs=1)
    with pytest.raises(Refused, match="not finite") as caught:
        _train(engine, toy, terms)
    assert caught.value.reason is Reason.TRAINING_FAILED


def test_an_adapter_that_diverged_is_not_evaluated(engine: Engine, toy) -> None:
    with pytest.raises(Refused, match="held-out") as caught:
        engine.evaluate(np.full_like(toy.theta, np.inf))
    assert caught.value.reason is Reason.TRAINING_FAILED


def test_an_update_without_any_change_is_refused(
    kind: Kind, make_toy: Callable[..., Toy], train_data: DataSource
) -> None:
    toy = make_toy(edit=NO_GRADIENT[kind.graph])
    refused = _refusal(kind, toy, train_data)
    assert refused.reason is Reason.TRAINING_FAILED
    assert "no value changed" in refused.subject


def test_a_graph_that_fails_when_run_is_refused(
    kind: Kind, make_toy: Callable[..., Toy], train_data: DataSource
) -> None:
    toy = make_toy(edit=("Gather(embeddings, input_ids)", "Gather(embeddings, shifted)"))
    assert _refusal(kind, toy, train_data).reason is Reason.PLAN_UNSUPPORTED
    beyond = make_toy(
        "beyond",
        edit=(
            "words = Gather(embeddings, input_ids)",
            "shifted = Add(input_ids, last)\n words = Gather(embeddings, shifted)",
        ),
    )
    assert _refusal(kind, beyond, train_data).reason is Reason.TRAINING_FAILED


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (("int64[B,S] input_ids", "int64[4,S] input_ids"), "input_ids"),
        (("int64[B,S] attention_mask", "int64[B,8] attention_mask"), "attention_mask"),
        (("=> (float loss_sum,", "=> ("), "loss_sum"),
        (("float[B] sample_weight)", "float[B] sample_weight, float[B] clip)"), "clip"),
        (("correct = ReduceSum<keepdims = 0>", "correct = ReduceSum<keepdims = 1>"), "correct"),
        (("float[B] sample_weight", "double[B] sample_weight"), ""),
    ],
    ids=["fixed batch", "fixed length", "no output", "another input", "rank", "ill-typed"],
)
def test_a_graph_with_another_contract_is_refused(
    kind: Kind,
    make_toy: Callable[..., Toy],
    train_data: DataSource,
    edit: tuple[str, str],
    named: str,
) -> None:
    refused = _refusal(kind, make_toy(edit=edit), train_data)
    assert refused.reason is Reason.PLAN_UNSUPPORTED
    assert named in refused.subject


def test_a_graph_for_other_sizes_than_the_plans_is_refused(
    kind: Kind, toy, train_data: DataSource, held_out: DataSource
) -> None:
    task = TextClassification(("lights", "music", "weather", "news"), 16, 0)
    four_labels = kind.make(toy.folder, replace(toy.plan, task=task), train_data, held_out)
    with pytest.raises(Refused, match="logits") as caught:
        four_labels.evaluate(toy.theta)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    shorter = replace(toy.plan, layout=toy.plan.layout[:1])
    with pytest.raises(Refused, match="theta") as caught:
        _train(kind.make(toy.folder, shorter, train_data), toy)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


@pytest.mark.parametrize("name", ["graph", "tokenizer.json", "base.safetensors"])
@pytest.mark.parametrize("content", [None, b"garbage"])
def test_a_damaged_plan_folder_is_refused(
    kind: Kind, toy, train_data: DataSource, name: str, content: bytes | None
) -> None:
    path: Path = toy.folder / (kind.graph if name == "graph" else name)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused = _refusal(kind, toy, train_data)
    assert refused.reason is Reason.PLAN_UNSUPPORTED
    assert str(toy.folder) not in refused.subject


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the product may catch it."""


def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(
    kind: Kind, toy, train_data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.checkpoints.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("edge_agent.checkpoints.PAUSE_PER_SAVE", 0.0)

    def live(last: int, folder: Path) -> np.ndarray:
        def progress(share: float) -> None:
            if round(share * 39) == last:
                raise Killed

        engine = kind.make(toy.folder, toy.plan, train_data)
        checkpoint = Checkpoint(folder, bytes(16), 1)
        return engine.train(toy.theta, TERMS, 5, progress, checkpoint).delta

    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    for last in (2, 20, 38):
        with pytest.raises(Killed):
            live(last, tmp_path / "killed")
    _require_same(kind, live(99, tmp_path / "killed"), live(99, tmp_path / "whole"))


@pytest.mark.parametrize("name", TASK_TOYS)
def test_every_task_is_learned_as_onnx_runtime_learns_it(
    kind: Kind, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of the graph whose gradient is written down are the oracle of the others."""
    made = TASK_TOYS[name](tmp_path / "plan")
    toy = made.toy

    def given(*_: object) -> tuple[GivenExamples, int]:
        return made.examples, 0

    for reader in ("read_examples", "read_held_out"):
        monkeypatch.setattr(f"edge_agent.local_training.{reader}", given)
    source = DataSource(tmp_path / "none")
    terms = replace(TERMS, epochs=5, learning_rate=0.05, batch_size=15, weight_decay=0.01)
    oracle, engine = (
        one.make(toy.folder, toy.plan, source, source, micro_batch=4)
        for one in (Kind("onnx", TRAIN_GRAPH), kind)
    )
    expected, found = (one.train(toy.theta, terms, 1, _quiet, Unkept()) for one in (oracle, engine))
    assert _relative(found.delta, expected.delta) < 1e-4
    assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-5)
    before, after = engine.evaluate(toy.theta), engine.evaluate(toy.theta + found.delta)
    same = oracle.evaluate(toy.theta + found.delta)
    assert before is not None
    assert after is not None
    assert same is not None
    assert after.mean_loss < 0.9 * before.mean_loss
    assert (after.count, after.correct) == (same.count, same.correct)
    assert after.mean_loss == pytest.approx(same.mean_loss, rel=1e-5)
