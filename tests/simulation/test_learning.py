"""FederatedLearning and the functional form, as a person uses them."""

import copy
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import coordinator
from fedloom.errors import ConfigError, Reason, Refused
from simulation.process import learning_process
from simulation.settings import training_of
from tests.simulation.samples import learning, network, rows, theta

ROOT = Path(__file__).parents[2]


def test_it_learns_what_its_clients_know() -> None:
    fl = learning(clients=10, held_out=rows(400, seed=99), terms={"training": {"epochs": 3}})
    finished = fl.train(num_rounds=12)
    first, last = finished[0].evaluation, finished[-1].evaluation
    assert last.correct / last.count > 0.8 > first.correct / first.count
    logits = fl.get_global_model()(torch.from_numpy(rows(400, seed=99)[0]))
    assert int((logits.argmax(1).numpy() == rows(400, seed=99)[1]).sum()) == last.correct


def test_the_callers_module_stays_as_it_is() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    fl = learning(model=model)
    fl.train(1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not np.array_equal(theta(fl), theta(learning(model=model)))


def test_one_step_of_all_is_a_step_of_gradient_descent() -> None:
    model, (inputs, labels) = network(), rows(60)
    fl = coordinator.FederatedLearning(
        model,
        torch.nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.5),
        terms={"training": {"batch_size": 60}},
    )
    fl.add_client((inputs[:20], labels[:20]))
    inputs, labels = torch.from_numpy(inputs), torch.from_numpy(labels)
    fl.add_client(torch.utils.data.TensorDataset(inputs[20:], labels[20:]))
    fl.train(1)
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    trained = fl.get_global_model().parameters()
    for old, gradient, new in zip(model.parameters(), gradients, trained, strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["masked", "encrypted", "sealed"])
def test_protected_rounds_are_the_plain_ones_within_their_levels(kind: str) -> None:
    plain, hidden = learning(), learning(protection=kind, terms={"protection": {"clip": 1.0}})
    plain.train(2)
    hidden.train(2)
    np.testing.assert_allclose(theta(hidden), theta(plain), atol=1e-4)
    assert not np.array_equal(theta(hidden), theta(plain))


def test_training_goes_on_where_it_stood() -> None:
    whole, halves = learning(), learning()
    whole.train(4)
    halves.train(1)
    halves.train(3)
    np.testing.assert_array_equal(theta(whole), theta(halves))
    assert [one.report.round for one in halves.history] == [1, 2, 3, 4]


def test_the_same_calls_go_on_in_the_folder_of_a_run(tmp_path: Path) -> None:
    def begun():
        return learning(out=tmp_path / "run", held_out=rows(30, seed=50))

    whole, first = learning(), begun()
    whole.train(5)
    first.train(2)
    first.train(1)  # and the process ends
    second = begun()
    assert second.train(2) == []
    second.train(3)
    assert [one.report.round for one in second.history] == [4, 5]
    np.testing.assert_array_equal(theta(second), theta(whole))
    other = learning(out=tmp_path / "run", seed=8)
    with pytest.raises(ConfigError, match="found another's"):
        other.train(1)


def test_the_functional_form_changes_no_state_and_repeats_itself() -> None:
    process = learning_process(network(), torch.nn.CrossEntropyLoss(), "sgd")
    first = process.initialize()
    kept = first.server.theta.copy()
    data = [rows(20, seed) for seed in range(4)]
    once, report = process.next(first, data)
    again, _ = process.next(first, data)
    assert report.clients == 4
    np.testing.assert_array_equal(first.server.theta, kept)
    np.testing.assert_array_equal(once.server.theta, again.server.theta)
    further, report = process.next(once, data[:2])
    assert (report.round, report.clients, further.server.rounds) == (2, 2, 2)


def test_the_functional_form_needs_clients_without_memory() -> None:
    with pytest.raises(ConfigError, match="FederatedLearning knows its clients"):
        learning_process(network(), torch.nn.CrossEntropyLoss(), "sgd", strategy="scaffold")


def test_a_robust_rule_reads_every_update() -> None:
    """The median of what five clients send, and of each alone, after a step of all their rows."""
    one_step = {"training": {"batch_size": 64, "local_steps": 1}}
    before = theta(learning(terms=one_step))
    alone = []
    for number in range(5):
        fl = learning(clients=0, terms=one_step)
        fl.add_client(rows(9 + 5 * number, seed=number + 1))
        fl.train(1)
        alone.append(theta(fl) - before)
    fl = learning(clients=5, terms={**one_step, "aggregation": {"rule": "median"}})
    fl.train(1)
    np.testing.assert_allclose(theta(fl) - before, np.median(alone, axis=0), atol=1e-6)
    assert np.abs(theta(fl) - before - np.mean(alone, axis=0)).max() > 1e-3


def test_a_run_on_its_plateau_trains_no_further() -> None:
    plateau = {"report": "mean", "patience": 2, "metric": "accuracy"}
    fl = learning(held_out=rows(60, seed=99), terms={"evaluation": plateau})
    finished = fl.train(60)
    assert 3 < len(finished) < 60
    told = [one.evaluation.correct for one in finished]
    # What a round began with: the two last of these are no better than all before.
    assert max(told[-3:-1]) <= max(told[:-3])
    assert fl.train(5) == []
    with pytest.raises(ConfigError, match="held-out rows"):
        learning(terms={"evaluation": plateau}).train(1)


def test_what_has_no_meaning_here_is_refused_with_its_reason() -> None:
    for training, problem in (
        ({"fine_tune_steps": 2}, "in no sum"),
        ({"lora": "rolora"}, "LORA_A and LORA_B in the plan's layout"),
        ({"personal": "fedper"}, "HEAD in the plan's layout"),
    ):
        with pytest.raises(ConfigError, match=problem):
            learning(terms={"training": training}).train(1)
    with pytest.raises(ConfigError, match="head: expected a module"):
        learning(head="nothing")
    loss, own = torch.nn.CrossEntropyLoss(), {"training": {"personal": "ditto"}}
    own["training"]["personal_lambda"] = 0.1
    with pytest.raises(ConfigError, match="keep from round to round"):
        learning_process(network(), loss, terms=own)


def test_a_client_that_diverges_is_left_out_and_a_round_of_them_fails() -> None:
    fl = learning(clients=3)
    inputs, labels = rows(20)
    fl.add_client((np.full_like(inputs, np.inf), labels))
    (finished,) = fl.train(1)
    assert (finished.report.clients, finished.report.failed) == (3, 1)
    assert np.isfinite(theta(fl)).all()

    alone = learning(clients=0)
    alone.add_client((np.full_like(inputs, np.inf), labels))
    with pytest.raises(Refused) as caught:
        alone.train(1)
    assert caught.value.reason is Reason.QUORUM_NOT_REACHED


PARAMETERS = [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("optimizer", "training"),
    [
        ("SGD", {"optimizer": "sgd"}),
        (
            torch.optim.SGD(PARAMETERS, lr=0.1, momentum=0.9),
            {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.9},
        ),
        (
            partial(torch.optim.AdamW, lr=0.01),
            {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.01},
        ),
        (
            torch.optim.Adagrad,
            {"optimizer": "adagrad", "learning_rate": 0.01, "weight_decay": 0.0},
        ),
    ],
)
def test_torchs_optimisers_are_ours(optimizer: object, training: dict[str, object]) -> None:
    assert training_of(optimizer) == training


@pytest.mark.parametrize(
    ("optimizer", "problem"),
    [
        (torch.optim.RMSprop, "found RMSprop"),
        (torch.optim.SGD(PARAMETERS, lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (torch.optim.Adam(PARAMETERS, weight_decay=0.1), "AdamW"),
        (torch.optim.AdamW(PARAMETERS, betas=(0.8, 0.9)), "betas"),
        (3, "found 3"),
    ],
)
def test_what_a_device_would_do_otherwise_is_refused(optimizer: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        training_of(optimizer)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"terms": {"training": {"speed": 1}}}, "unknown key"),
        ({"strategy": "fed_best"}, "fed_best"),
        ({"model": torch.nn.Sequential(torch.nn.BatchNorm1d(12))}, "running statistics"),
        ({"protection": "sealed"}, "protection.clip"),
        ({"workers": 0}, "workers"),
        ({"engine": "cloud"}, "engine"),
        ({"address": "10.0.0.1:6379"}, "address"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], problem: str) -> None:
    model = change.pop("model", None)
    with pytest.raises(ConfigError, match=problem):
        learning(model=model, optimizer="sgd", **change).train(1)


def test_the_readmes_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## In simulation") :]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    found: dict[str, object] = {}
    exec(example[1], found)  # noqa: S102 - our own README
    assert isinstance(found["model"], torch.nn.Module)
