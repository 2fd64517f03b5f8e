"""Adapters at a lower rank: the nearest there is, in every form of an export."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from fedloom.export_forms import Form, TrainedModel, export_forms
from fedloom.plans import ADAPTER_CONFIG_FILE, ADAPTER_FILE, Plan, PlanOrigin, Role, TrainableTensor
from fedloom.rank_pruning import pruned, pruned_theta
from fedloom.tasks import TextClassification
from fedloom.tensor_files import read_tensors

R = 4
SHAPES = (
    ("m.lora_A.weight", (R, 9), Role.LORA_A),
    ("m.lora_B.weight", (6, R), Role.LORA_B),
    ("n.lora_A.weight", (R, 3), Role.LORA_A),  # fewer extents than ranks
    ("n.lora_B.weight", (5, R), Role.LORA_B),
    ("head.weight", (2, 3), Role.HEAD),
)


def plan_of(shapes: tuple[tuple[str, tuple[int, ...], Role], ...] = SHAPES) -> Plan:
    """Return a plan of these tensors, without members."""
    layout: list[TrainableTensor] = []
    for name, shape, role in shapes:
        offset = layout[-1].offset + layout[-1].size if layout else 0
        layout.append(TrainableTensor(name, shape, offset, role))
    task = TextClassification(("no", "yes"), 8, 0)
    return Plan("toy", (), tuple(layout), task, PlanOrigin("base", R, 16.0, ("m", "n")))


PLAN = plan_of()


def drawn(seed: int) -> np.ndarray:
    """Return a theta."""
    values = np.random.default_rng(seed).standard_normal(PLAN.parameter_count)
    return values.astype(np.float32)


def products(theta: np.ndarray) -> list[np.ndarray]:
    """Return B A of both pairs, in float64."""
    parts = [theta[t.offset : t.offset + t.size].reshape(t.shape) for t in PLAN.layout]
    a1, b1, a2, b2, _ = (part.astype(np.float64) for part in parts)
    return [b1 @ a1, b2 @ a2]


@given(st.integers(0, 2**32 - 1), st.integers(1, R))
def test_products_are_the_nearest_of_their_rank(seed: int, rank: int) -> None:
    """The oracle cuts the singular values of the products themselves."""
    theta = drawn(seed)
    found = pruned_theta(PLAN, theta, rank)
    lost = whole = 0.0
    for product, near in zip(products(theta), products(found.theta), strict=True):
        u, values, v = np.linalg.svd(product, full_matrices=False)
        expected = (u[:, :rank] * values[:rank]) @ v[:rank]
        np.testing.assert_allclose(near, expected, atol=1e-4)
        lost, whole = lost + np.sum(values[rank:] ** 2), whole + np.sum(values**2)
    assert found.lost == pytest.approx(np.sqrt(lost / whole), abs=1e-6)
    head = PLAN.layout[-1]
    np.testing.assert_array_equal(found.theta[head.offset :], theta[head.offset :])


@given(st.integers(0, 2**32 - 1), st.integers(1, R), st.integers(1, R))
def test_pruning_twice_is_pruning_to_the_lower_rank(seed: int, one: int, other: int) -> None:
    twice = pruned_theta(PLAN, pruned_theta(PLAN, drawn(seed), one).theta, other)
    once = pruned_theta(PLAN, drawn(seed), min(one, other))
    for found, expected in zip(products(twice.theta), products(once.theta), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_adapter_of_zeros_stays_one() -> None:
    found = pruned_theta(PLAN, np.zeros(PLAN.parameter_count, np.float32), 2)
    assert (found.theta.any(), found.lost) == (False, 0.0)


def test_pefts_form_is_smaller_and_says_so(tmp_path: Path) -> None:
    """alpha / rank stays what graphs and devices scale by."""
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({"r": R, "lora_alpha": 16.0, "x": 1}))
    theta = drawn(1)
    model = pruned(TrainedModel(folder, PLAN, theta, "# A model"), 2)
    export_forms(model, (Form.PEFT, Form.SAFETENSORS), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "peft" / ADAPTER_CONFIG_FILE).read_text())
    assert config == {"r": 2, "lora_alpha": 8.0, "x": 1}
    tensors = read_tensors(tmp_path / "out" / "peft" / ADAPTER_FILE)
    assert tensors["m.lora_A.weight"].shape == (2, 9)
    assert tensors["m.lora_B.weight"].shape == (6, 2)
    near = products(model.theta)[0]
    product = tensors["m.lora_B.weight"] @ tensors["m.lora_A.weight"]
    np.testing.assert_allclose(product, near, atol=1e-5)
    assert "Pruned from rank 4 to 2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("shapes", "rank", "named"),
    [
        (SHAPES, 0, "expected 1..4, found 0"),
        (SHAPES, 5, "expected 1..4, found 5"),
        (SHAPES[1:2], 2, "trains A and B"),
        ((("m.lora_R.weight", (R, R), Role.LORA_R),), 2, "trains A and B"),
    ],
)
def test_what_cannot_be_pruned_is_said(
    shapes: tuple[tuple[str, tuple[int, ...], Role], ...], rank: int, named: str
) -> None:
    plan = plan_of(shapes)
    with pytest.raises(ConfigError, match=named):
        pruned_theta(plan, np.zeros(plan.parameter_count, np.float32), rank)
