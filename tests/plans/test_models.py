"""Other encoders get plans too; what cannot be exported is named."""

import numpy as np
import pytest

from coordinator.plans import PlanExportError, PlanRequest, build_plan
from fedloom.graph_contracts import INFER_GRAPH

TARGETS = {"distilbert": ("q_lin", "v_lin"), "roberta": ("query", "value")}


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_other_encoders(kind, tiny_model, graph_cache, tmp_path, open_graph, peft_model, small):
    import torch

    folder = tmp_path / "plan"
    request = PlanRequest(
        model=str(tiny_model(kind)),
        labels=("no", "yes", "maybe"),
        targets=TARGETS[kind],
        max_tokens=24,
    )
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    names = {tensor.name for tensor in plan.layout}
    # Whatever the checkpoint does not bring travels with the adapter.
    head = {"distilbert": "pre_classifier.weight", "roberta": "classifier.dense.weight"}[kind]
    assert f"base_model.model.{head}" in names

    built = type(small)(folder, plan, request.model)
    ids = np.random.default_rng(1).integers(1, 21, (3, 9))
    mask = np.ones_like(ids)
    mask[1, 5:], ids[1, 5:] = 0, 0
    found = open_graph(folder / INFER_GRAPH).run(None, {"input_ids": ids, "attention_mask": mask})
    model = peft_model(built, folder)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).logits
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def depends_on_data(self, hidden, residual):
    return hidden + residual if hidden.sum() > 0 else residual


def strange_operator(self, hidden, residual):
    import torch

    return torch.special.bessel_j0(hidden.detach()) + hidden + residual


@pytest.mark.parametrize(
    ("forward", "named"),
    [(depends_on_data, "module BertSelfOutput"), (strange_operator, r"operator prims\.bessel_j0")],
)
def test_what_cannot_be_exported_is_named(bert, tmp_path, monkeypatch, forward, named):
    from transformers.models.bert.modeling_bert import BertSelfOutput

    monkeypatch.setattr(BertSelfOutput, "forward", forward)
    request = PlanRequest(model=str(bert), labels=("no", "yes"), max_tokens=24)
    with pytest.raises(PlanExportError, match=named) as caught:
        build_plan(request, tmp_path / "plan", lambda line: None, None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "limit"), [("bert", 48), ("roberta", 47), ("distilbert", 48)])
def test_position_limit(kind, limit, tiny_model):
    """RoBERTa counts from the position after its padding token's, here 0."""
    import transformers

    from coordinator.plans.checkpoints import position_limit

    assert position_limit(transformers.AutoModel.from_pretrained(tiny_model(kind))) == limit
