"""Clients of a torch module that send parts of it, and keep parts or a model of their own."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from simulation.torch_mover import theta_of
from tests.simulation.samples import CLASSES, FEATURES, learning, rows, theta


def adapter() -> torch.nn.Module:
    """Return a network whose middle layer has two factors, named as PEFT names them."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        OrderedDict(
            lora_A=torch.nn.Linear(FEATURES, 2, bias=False),
            lora_B=torch.nn.Linear(2, 16, bias=False),
            relu=torch.nn.ReLU(),
            classifier=torch.nn.Linear(16, CLASSES),
        )
    )


OWN = [
    {"lora": "ffa"},
    {"lora": "rolora"},
    {"lora": "fedsa"},
    {"personal": "fedper"},
    {"personal": "fedrep", "head_steps": 1, "local_steps": 3},
    {"personal": "ditto", "personal_lambda": 0.5},
    {"personal": "fedper", "lora": "rolora", "max_steps": 3, "weighting": "uniform"},
]


@pytest.mark.parametrize("rule", OWN, ids=str)
def test_parts_and_own_models_are_those_of_one_process_and_of_one_by_one(
    rule: dict[str, object], tmp_path: Path
) -> None:
    found = {}
    for vectorise, workers in ((False, 1), (False, 2), (True, 1), (True, 2)):
        fl = learning(
            model=adapter(),
            head="classifier",
            terms={"training": {"batch_size": 8, **rule}},
            strategy="scaffold" if "max_steps" in rule else "fed_avg",
            held_out=rows(64, seed=99),
            cohort_size=5,
            workers=workers,
            vectorise=vectorise,
            out=tmp_path / f"{vectorise}-{workers}",
        )
        history = fl.train(4)
        found[vectorise, workers] = theta(fl), history
    for vectorise in (False, True):
        np.testing.assert_array_equal(found[vectorise, 1][0], found[vectorise, 2][0])
        assert found[vectorise, 1][1] == found[vectorise, 2][1]
    np.testing.assert_allclose(found[False, 1][0], found[True, 1][0], atol=1e-6)
    head = theta_of(adapter())[-17 * CLASSES :]
    stays = rule.get("personal") in ("fedper", "fedrep")
    assert np.array_equal(found[False, 1][0][-17 * CLASSES :], head) == stays


def test_own_heads_learn_what_the_global_model_does_not(tmp_path: Path) -> None:
    """Accuracy is that of the clients' own models; the head of the global one never moves."""
    fl = learning(
        model=adapter(),
        head="classifier",
        terms={"training": {"batch_size": 8, "epochs": 4, "personal": "fedper"}},
        held_out=rows(200, seed=99),
    )
    last = fl.train(8)[-1].evaluation
    assert last is not None
    inputs, labels = rows(200, seed=99)
    with torch.inference_mode():
        shared = (
            fl.get_global_model()(torch.from_numpy(inputs)).argmax(1).numpy() == labels
        ).mean()
    assert last.count == 200 * 7
    assert last.correct / last.count > shared.mean() + 0.1


def test_a_client_with_too_few_steps_for_its_head_is_told_apart() -> None:
    """The first client has 9 rows, two batches: no step is left for the rest of its model."""
    for vectorise in (False, True):
        fl = learning(
            model=adapter(),
            head="classifier",
            terms={"training": {"batch_size": 8, "personal": "fedrep", "head_steps": 2}},
            vectorise=vectorise,
        )
        [first] = fl.train(1)
        assert (first.report.clients, first.report.failed) == (5, 2)
