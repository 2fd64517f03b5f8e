"""`train_dp.onnx` clips every row's gradient as if the rows had been trained one by one."""

import dataclasses

import numpy as np
import pytest

from coordinator.plans import PlanExportError, PlanRequest, build_plan
from fedloom.graph_contracts import TRAIN_DP_GRAPH, TRAIN_GRAPH
from fedloom.plans import load_plan
from fedloom.tasks import CausalLanguageModelling, TextClassification, TokenClassification

NAMES = ("loss_sum", "weight_sum", "correct", "clipped_grad_sum", "grad_norm")


@pytest.fixture(scope="module")
def private(small, graph_cache, tmp_path_factory):
    """The small plan with the clipping graph."""
    folder = tmp_path_factory.mktemp("plans") / "private"
    request = PlanRequest(
        model=str(small.model), labels=small.plan.task.labels, rank=4, max_tokens=32, dp=True
    )
    return dataclasses.replace(
        small, folder=folder, plan=build_plan(request, folder, lambda line: None, graph_cache)
    )


@pytest.fixture(scope="module")
def clipping(private, open_graph):
    return open_graph(private.folder / TRAIN_DP_GRAPH)


@pytest.fixture(scope="module")
def rows(private, open_graph, random_batch, any_theta):
    """A batch, a theta, and the oracle: `train.onnx` on each row alone."""
    train = open_graph(private.folder / TRAIN_GRAPH)
    theta = any_theta(private.plan, 1)
    batch = random_batch(private.plan, 7, 13, seed=1)
    batch["sample_weight"] = np.float32([1, 0.5, 2, 1, 0, 1, 3])
    single = [
        train.run(None, {"theta": theta, **{name: v[i : i + 1] for name, v in batch.items()}})
        for i in range(7)
    ]
    return batch, theta, single


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0], ids=["all clipped", "some", "none"])
def test_it_is_the_clipped_sum_of_single_rows(clipping, rows, share):
    batch, theta, single = rows
    gradients = np.stack([gradient for *_, gradient in single])
    norms = np.linalg.norm(gradients, axis=1)
    clip = np.array(max(share * norms.max(), 1e-3), np.float32)
    loss, weight, correct, clipped, found = clipping.run(
        NAMES, {"theta": theta, **batch, "clip": clip}
    )
    np.testing.assert_allclose(found, norms, rtol=1e-5, atol=1e-7)
    scale = np.minimum(1, clip / np.maximum(norms, 1e-12))
    expected = scale @ gradients
    assert np.linalg.norm(clipped - expected) <= 1e-5 * np.linalg.norm(expected)
    for index, value in enumerate((loss, weight, correct)):
        assert value == pytest.approx(sum(step[index] for step in single), rel=1e-5)


def test_no_row_moves_the_sum_by_more_than_the_clip(clipping, rows):
    """What the privacy guarantee rests on: the sensitivity of the sum to any one row."""
    batch, theta, _ = rows
    clip = np.array(0.01, np.float32)
    whole = clipping.run(["clipped_grad_sum"], {"theta": theta, **batch, "clip": clip})[0]
    for row in range(7):
        without = {name: np.delete(values, row, axis=0) for name, values in batch.items()}
        rest = clipping.run(["clipped_grad_sum"], {"theta": theta, **without, "clip": clip})[0]
        assert np.linalg.norm(whole - rest) <= 0.01 * (1 + 1e-4)


def test_the_plan_names_the_graph_only_where_it_was_asked_for(private, small):
    assert load_plan(private.folder).member(TRAIN_DP_GRAPH).size_bytes < 100_000
    assert TRAIN_DP_GRAPH not in {member.name for member in small.plan.members}
    for name in (TRAIN_GRAPH, "base.safetensors"):
        assert private.plan.member(name) == small.plan.member(name)


def test_a_sum_that_is_not_clipped_is_found(private, tmp_path):
    """The comparison with torch fails for a graph that leaves rows as they are."""
    import shutil

    import onnx

    from coordinator.plans import parity
    from coordinator.plans.families import load_model

    folder = tmp_path / "copy"
    shutil.copytree(private.folder, folder)
    model = onnx.load(folder / TRAIN_DP_GRAPH, load_external_data=False)
    (limit,) = [node for node in model.graph.node if "clip" in node.input]
    limit.op_type = "Add"
    (folder / TRAIN_DP_GRAPH).write_bytes(model.SerializeToString())
    request = PlanRequest(
        model=str(private.model), labels=private.plan.task.labels, rank=4, max_tokens=32
    )
    adapted = load_model(request)
    with pytest.raises(PlanExportError, match="clipped sum") as caught:
        parity.check_train_dp(folder, adapted)
    assert caught.value.graph == TRAIN_DP_GRAPH


def test_layers_with_values_of_each_row_equal_single_rows():
    """Both layers, with axes between rows and features, against torch row by row."""
    import torch

    from coordinator.plans.dp import RowParameters

    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    functional = torch.nn.functional
    for between in ((), (4,), (2, 3)):
        values = random(5, *between, 6)
        weight, bias, scale, shift = random(5, 7, 6), random(5, 7), random(5, 6), random(5, 6)
        with RowParameters([weight, bias, scale, shift]):
            linear = functional.linear(values, weight, bias)
            norm = functional.layer_norm(values, (6,), scale, shift)
        for row in range(5):
            alone = functional.linear(values[row], weight[row], bias[row])
            torch.testing.assert_close(linear[row], alone)
            alone = functional.layer_norm(values[row], (6,), scale[row], shift[row])
            torch.testing.assert_close(norm[row], alone)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((3, 3), {}),
        ((3, 2), {"stride": 2, "padding": 1}),
        ((2, 3), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    ],
)
def test_convolutions_and_norms_with_values_of_each_row_equal_single_rows(size, settings):
    import torch

    from coordinator.plans.dp import RowParameters

    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    functional = torch.nn.functional
    images, mean, variance = random(4, 3, 9, 8), random(5), random(5).abs() + 0.5
    weight, bias, scale, shift = random(4, 5, 3, *size), random(4, 5), random(4, 5), random(4, 5)
    with RowParameters([weight, bias, scale, shift]):
        found = functional.conv2d(images, weight, bias, **settings)
        normal = functional.batch_norm(found, mean, variance, scale, shift)
    for row in range(4):
        alone = functional.conv2d(images[row : row + 1], weight[row], bias[row], **settings)
        torch.testing.assert_close(found[row : row + 1], alone)
        alone = functional.batch_norm(alone, mean, variance, scale[row], shift[row])
        torch.testing.assert_close(normal[row : row + 1], alone)


def test_a_row_of_many_labels_counts_as_their_mean():
    import torch

    from coordinator.plans.dp import _weight_of_labels

    labels = torch.tensor([[1, -100, 2, 3], [-100, -100, -100, -100], [5, -100, -100, -100]])
    weight = torch.tensor([3.0, 1.0, 2.0])
    tags = TokenClassification(("a", "b"), 8, 0)
    assert _weight_of_labels(tags, labels, weight).tolist() == [1.0, 1.0, 2.0]
    text = CausalLanguageModelling(8, 0, 9, 1, 1, 1)  # the first token is not learned
    assert _weight_of_labels(text, labels, weight).tolist() == [1.5, 1.0, 2.0]
    one = TextClassification(("a", "b"), 8, 0)
    assert _weight_of_labels(one, labels[:, 0], weight) is weight


def test_an_operation_without_such_a_form_is_refused():
    import torch

    from coordinator.plans.dp import RowParameters

    weight = torch.ones(3, 4)
    with RowParameters([weight]), pytest.raises(PlanExportError, match="--no-dp"):
        torch.ones(3, 4) * weight
