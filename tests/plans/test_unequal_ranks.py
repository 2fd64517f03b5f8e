"""HetLoRA on real graphs: what a device has truncated has no gradient, whatever the data."""

import numpy as np

from fedloom.graph_contracts import TRAIN_GRAPH
from fedloom.plans import Role
from fedloom.strategies.hetlora import truncated


def test_a_truncated_adapter_has_no_gradient_beyond_its_rank(
    small, open_graph, random_batch, any_theta
):
    theta = truncated(small.plan.layout, any_theta(small.plan, 3), 2)
    batch = random_batch(small.plan, 5, 11, seed=4)
    gradient = open_graph(small.folder / TRAIN_GRAPH).run(None, {"theta": theta, **batch})[3]
    np.testing.assert_array_equal(gradient, truncated(small.plan.layout, gradient, 2))
    for tensor in small.plan.layout:
        if tensor.role in (Role.LORA_A, Role.LORA_B):
            values = gradient[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
            kept = values[:2] if tensor.role is Role.LORA_A else values[:, :2]
            assert kept.all()
