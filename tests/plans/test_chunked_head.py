"""A loss in pieces is the whole one, and takes less memory."""

from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from fedloom.errors import ConfigError
from fedloom.graph_contracts import EVAL_GRAPH, TRAIN_GRAPH

VOCABULARY = 400


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a two-layer decoder whose vocabulary is much larger than its width."""
    import torch
    import transformers

    from tests.plans.conftest import save_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("pieces", [1, 2, 5, 40])
def test_sums_and_slopes_are_those_of_the_whole(pieces):
    """Also where the pieces are more than the rows, and where nothing is learned in some."""
    import torch

    from coordinator.plans.chunked_head import chunked_sums

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((3, 7, 8), generator=generator, requires_grad=True)
    head = torch.randn((11, 8), generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[torch.rand((3, 7), generator=generator) < 0.4] = -100
    weight = torch.tensor([1.0, 0.5, 0.0])
    sums = chunked_sums(hidden, head, labels, weight, pieces)
    (slope,) = torch.autograd.grad(3 * sums.loss, [hidden])
    logits, targets = (hidden @ head.t())[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", ignore_index=-100
    )
    weights = weight[:, None] * (targets != -100)
    (expected,) = torch.autograd.grad(3 * (losses * weights).sum(), [hidden])
    torch.testing.assert_close(sums.loss, (losses * weights).sum())
    torch.testing.assert_close(sums.weight, weights.sum())
    torch.testing.assert_close(sums.correct, ((logits.argmax(-1) == targets) * weights).sum())
    torch.testing.assert_close(slope, expected)


@pytest.mark.timeout(1200)
def test_a_plan_in_pieces_trains_the_same_in_less_memory(llama, graph_cache, open_graph, tmp_path):
    """Built, and so compared with torch, both ways; the other graphs take all logits."""
    plans = {}
    for pieces in (1, 4):
        request = PlanRequest(
            str(llama), task="causal-lm", rank=2, max_tokens=32, loss_pieces=pieces
        )
        plans[pieces] = build_plan(request, tmp_path / str(pieces), print, graph_cache)
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCABULARY, (3, 32))
    batch = {
        "theta": 0.1 * random.standard_normal(plans[1].parameter_count).astype(np.float32),
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": ids,
        "sample_weight": np.float32([1, 2, 0.5]),
    }
    for graph in (TRAIN_GRAPH, EVAL_GRAPH):
        whole, cut = (open_graph(tmp_path / str(n) / graph).run(None, batch) for n in (1, 4))
        for found, expected in zip(cut, whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    needs = [plans[pieces].training_memory.needed(8, 32) for pieces in (1, 4)]
    assert needs[1] < 0.6 * needs[0]


def test_a_head_that_is_more_than_a_frozen_matrix_is_refused():
    import torch

    from coordinator.plans.chunked_head import _frozen_name, _head

    head = torch.nn.Linear(2, 3)
    core = SimpleNamespace(get_output_embeddings=lambda: head)
    biased = SimpleNamespace(network=SimpleNamespace(get_base_model=lambda: core))
    with pytest.raises(ConfigError, match=r"loss_pieces: .* without a bias"):
        _head(biased)
    with pytest.raises(ConfigError, match=r"loss_pieces: .* trained"):
        _frozen_name(SimpleNamespace(network=head, frozen=()), head)


@pytest.mark.parametrize("changes", [{"loss_pieces": 0}, {"task": "classification"}])
def test_pieces_are_for_language_models(changes):
    arguments = {"task": "causal-lm", "loss_pieces": 2, **changes}
    with pytest.raises(ConfigError, match="loss_pieces"):
        PlanRequest("any", labels=("a", "b") if changes.get("task") else (), **arguments)
