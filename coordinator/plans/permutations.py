"""Whether the hidden neurons of a plan's model may change places: asked of its graph, not of names.

A layout that looks like a chain of layers may be one with a residual connection, or a product with
something frozen. In a true chain logits stay the same where the rows of a layer and the inputs of
the next one are permuted alike; `infer.onnx` tells.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import Plan
from fedloom.strategies.fedma import Layer, chain
from fedloom.tasks import ArrayLearning

_ROWS, _TOLERANCE = 4, 1e-3


def permuted(
    theta: Theta, layers: tuple[Layer, ...], hidden: int, order: NDArray[np.intp]
) -> Theta:
    """Return theta whose hidden layer has neuron order[i] at place i, and computes the same."""
    moved, layer, following = theta.copy(), layers[hidden], layers[hidden + 1]
    for tensor in filter(None, (layer.weight, layer.bias)):
        values = slice(tensor.offset, tensor.offset + tensor.size)
        moved[values] = theta[values].reshape(tensor.shape)[order].reshape(-1)
    columns = (order[:, None] * following.spread + np.arange(following.spread)).reshape(-1)
    weight = following.weight
    values = slice(weight.offset, weight.offset + weight.size)
    moved[values] = theta[values].reshape(weight.shape)[:, columns].reshape(-1)
    return moved


def check_permutable(plan: Plan, folder: Path) -> bool:
    """Check the plan's graph; False where it cannot be run here.

    Raises Refused(PLAN_UNSUPPORTED) for a model whose hidden neurons cannot change places.
    """
    layers = chain(plan.layout)
    if not isinstance(plan.task, ArrayLearning) or not (folder / INFER_GRAPH).is_file():
        return False
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(
        str(folder / INFER_GRAPH), options, providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    rows = {
        entry.name: random.standard_normal((_ROWS, *entry.shape), np.float32)
        for entry in plan.task.inputs
    }
    theta = np.zeros(plan.parameter_count, np.float32)
    for tensor in plan.layout:
        scale = np.sqrt(tensor.shape[0] / tensor.size)  # by the number of inputs: logits near 1
        values = scale * random.standard_normal(tensor.size)
        theta[tensor.offset : tensor.offset + tensor.size] = values

    def logits(values: Theta) -> NDArray[np.float32]:
        (found,) = session.run(["logits"], {"theta": values, **rows})
        return np.asarray(found)

    expected = logits(theta)
    for hidden, layer in enumerate(layers[:-1]):
        order = random.permutation(layer.weight.shape[0])
        moved = logits(permuted(theta, layers, hidden, order))
        if not np.allclose(moved, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise Refused(
                Reason.PLAN_UNSUPPORTED,
                f"expected {layers[hidden + 1].weight.name} to follow {layer.weight.name} and "
                "nothing else, found a model whose outputs change with the order of that layer's "
                "neurons (a residual connection, a product, a norm); use strategy fed_avg",
            )
    return True
