"""The comparison with torch finds what is wrong with a graph, and says so."""

import shutil

import onnx
import pytest
from onnx import helper

from coordinator.plans import PlanExportError, PlanRequest
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH


@pytest.fixture(scope="module")
def adapted(small):
    from coordinator.plans.families import load_model

    request = PlanRequest(
        model=str(small.model), labels=small.plan.task.labels, rank=4, max_tokens=32
    )
    return load_model(request)


@pytest.fixture
def copy(small, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    return folder


def edit(path, change):
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def negate_gradient(graph):
    (node,) = [node for node in graph.node if "grad_sum" in node.output]
    node.output[:] = ["before"]
    graph.node.append(helper.make_node("Neg", ["before"], ["grad_sum"]))


def drop_activation(graph):
    next(node for node in graph.node if node.op_type == "Tanh").op_type = "Identity"


def fixed_extent(graph):
    """Freeze the batch size into the graph, as a tracer does that takes an extent for constant."""
    node = next(node for node in graph.node if node.op_type == "Shape")
    shape = helper.make_tensor("fixed", onnx.TensorProto.INT64, [1], [3])
    graph.initializer.append(shape)
    node.CopyFrom(helper.make_node("Identity", ["fixed"], list(node.output)))


def test_whole_plan_passes(adapted, small):
    from coordinator.plans import parity

    figures = parity.check_train(small.folder, adapted)
    assert figures.loss < 1e-5
    assert figures.gradient < 1e-5
    assert parity.check_infer(small.folder, adapted) < 1e-5


def test_negated_gradient(adapted, copy):
    from coordinator.plans import parity

    edit(copy / TRAIN_GRAPH, negate_gradient)
    with pytest.raises(PlanExportError, match=r"train\.onnx: .*gradient 2\.0e\+00") as caught:
        parity.check_train(copy, adapted)
    assert caught.value.graph == TRAIN_GRAPH


@pytest.mark.parametrize("change", [drop_activation, fixed_extent])
def test_wrong_inference(adapted, copy, change):
    from coordinator.plans import parity

    edit(copy / INFER_GRAPH, change)
    with pytest.raises(PlanExportError, match=r"infer\.onnx"):
        parity.check_infer(copy, adapted)


def test_graph_that_does_not_load(adapted, copy):
    from coordinator.plans import parity

    (copy / TRAIN_GRAPH).write_bytes(b"no graph")
    with pytest.raises(PlanExportError, match="ONNX Runtime refuses it"):
        parity.check_train(copy, adapted)


def test_the_check_leaves_the_model_as_it_was(adapted, small):
    from coordinator.plans import parity

    before = {name: value.clone() for name, value in adapted.network.state_dict().items()}
    parity.check_train(small.folder, adapted)
    for name, value in adapted.network.state_dict().items():
        assert value.equal(before[name]), name
    assert not any(parameter.requires_grad for parameter in adapted.network.parameters())
