"""`infer.onnx` answers with the adapter beside it or with the one it is given; PEFT agrees."""

import shutil

import numpy as np
import pytest

from fedloom.adapters import write_adapter
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import ADAPTER_FILE

TOKENS = ("input_ids", "attention_mask")


@pytest.fixture
def tokens(small, random_batch):
    batch = random_batch(small.plan, 5, 13, seed=7)
    return {name: batch[name] for name in TOKENS}


@pytest.fixture
def trained(small, any_theta, tmp_path):
    """A copy of the plan whose adapter file holds another adapter, and that adapter."""
    folder = tmp_path / "trained"
    shutil.copytree(small.folder, folder)
    theta = any_theta(small.plan, 5)
    write_adapter(folder / ADAPTER_FILE, small.plan.layout, theta)
    return folder, theta


def test_theta_defaults_to_the_adapter_file(small, trained, tokens, open_graph):
    folder, theta = trained
    given = open_graph(small.folder / INFER_GRAPH).run(None, {"theta": theta, **tokens})[0]
    default = open_graph(folder / INFER_GRAPH).run(None, tokens)[0]
    np.testing.assert_array_equal(default, given)
    initial = open_graph(small.folder / INFER_GRAPH).run(None, tokens)[0]
    assert np.abs(initial - given).max() > 1e-3


def test_contract(small, open_graph):
    session = open_graph(small.folder / INFER_GRAPH)
    assert [port.name for port in session.get_inputs()] == list(TOKENS)
    (theta,) = session.get_overridable_initializers()
    assert (theta.name, theta.shape) == ("theta", [small.plan.parameter_count])
    (logits,) = session.get_outputs()
    assert (logits.name, logits.shape) == ("logits", ["batch", 5])


def test_peft_loads_the_folder_and_gives_the_same_logits(
    small, trained, tokens, open_graph, peft_model
):
    import torch

    folder, _ = trained
    model = peft_model(small, folder)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(v) for name, v in tokens.items()}).logits
    found = open_graph(folder / INFER_GRAPH).run(None, tokens)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (17, 2)])
def test_any_shape(small, shape, open_graph):
    ids = np.ones(shape, np.int64)
    logits = open_graph(small.folder / INFER_GRAPH).run(
        None, {"input_ids": ids, "attention_mask": ids}
    )[0]
    assert logits.shape == (shape[0], 5)
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), rtol=1e-5)
