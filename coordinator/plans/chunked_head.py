"""A language model's head and loss in pieces, where logits are most of a training step's memory.

Only one piece's logits exist at a time: the gradient with respect to the hidden states is taken on
the spot, which a frozen head allows. Losses and gradients are those of the whole, but for rounding.
"""

from typing import Any

import torch

from coordinator.plans.families.causal_lm import LanguageModel
from coordinator.plans.graphs import Step, Trace, cut, example_batch, leaves
from coordinator.plans.model import AdaptedModel, Batch, BoundNetwork, Sums
from fedloom.errors import ConfigError
from fedloom.graph_contracts import eval_contract, infer_contract, train_contract
from fedloom.tasks import IGNORED_LABEL


def chunked_traces(
    adapted: AdaptedModel, family: LanguageModel, pieces: int
) -> tuple[Trace, Trace]:
    """Return what to trace for training, and for evaluation and inference, which need all logits.

    Raises ConfigError for a model whose head is more than one frozen matrix.
    """
    example = {"theta": torch.from_numpy(adapted.theta), **example_batch(adapted)}
    count = len(adapted.theta)
    others = (eval_contract(adapted.task, count), infer_contract(adapted.task, count))
    return (
        Trace(
            chunked_training_step(adapted, family, pieces),
            example,
            (train_contract(adapted.task, count, adapted.trained_count),),
        ),
        Trace(evaluation_step(adapted), dict(example), others),
    )


def chunked_training_step(adapted: AdaptedModel, family: LanguageModel, pieces: int) -> Step:
    """Return a step with its gradient, without logits: (theta, inputs, labels, weight, frozen)."""
    names = list(family.example(2, 2, seed=0))
    head = _head(adapted)
    place = adapted.frozen.index(_frozen_name(adapted, head))

    def step(theta: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, frozen = dict(zip(names, rest, strict=False)), rest[len(names) :]
        labels, weight = batch.pop("labels"), batch.pop("sample_weight")
        with torch.enable_grad():
            values, residuals = leaves(adapted, theta)
            run = adapted.bound([*values, *residuals], frozen)
            hidden = _hidden(family, head, run, batch)
            sums = chunked_sums(hidden, frozen[place], labels, weight, pieces)
            gradients = torch.autograd.grad(sums.loss, values)
        grad_sum = torch.cat([gradient.reshape(-1) for gradient in gradients])
        found = (sums.loss, sums.weight, sums.correct, grad_sum)
        return tuple(value.detach() for value in found)

    return step


def evaluation_step(adapted: AdaptedModel) -> Step:
    """Return a step without its gradient: sums, then logits."""
    names = list(adapted.family.example(2, 2, seed=0))

    def step(theta: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, frozen = dict(zip(names, rest, strict=False)), rest[len(names) :]
        labels, weight = batch.pop("labels"), batch.pop("sample_weight")
        with torch.no_grad():
            logits = adapted.family.logits(adapted.bound(cut(adapted, theta), frozen), batch)
            sums = adapted.family.sums(logits, labels, weight)
        return sums.loss, sums.weight, sums.correct, logits

    return step


def chunked_sums(
    hidden: torch.Tensor,  # (B, S, H)
    head: torch.Tensor,  # (V, H), frozen
    labels: torch.Tensor,  # (B, S), each its own position's token
    weight: torch.Tensor,  # (B,)
    pieces: int,
) -> Sums:
    """Return what LanguageModel.sums gives for the logits hidden · headᵀ."""
    nothing = torch.full_like(labels[:, :1], IGNORED_LABEL)
    targets = torch.cat([labels[:, 1:], nothing], 1).reshape(-1)  # (T,)
    learned = targets != IGNORED_LABEL
    weights = weight[:, None].expand_as(labels).reshape(-1) * learned.to(torch.float32)
    targets = torch.where(learned, targets, 0)
    rows = hidden.reshape(-1, hidden.shape[-1])  # (T, H)
    loss, correct = _ChunkedCrossEntropy.apply(rows, head, targets, weights, pieces)  # type: ignore[no-untyped-call] # torch's
    return Sums(loss, weights.sum(), correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies and of hits, over one piece of the rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        pieces: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = rows.shape[0]
        size = (count + pieces - 1) // pieces
        # Rows of weight 0 fill the last piece: every piece has the same, free size.
        rows, targets, weights = (_filled(value, pieces - 1) for value in (rows, targets, weights))
        loss, correct, slopes = weights.sum() * 0.0, weights.sum() * 0.0, []
        for i in range(pieces):
            part = slice(i * size, (i + 1) * size)
            target, share = targets[part], weights[part]
            logits = rows[part] @ head.t()  # (T / pieces, V)
            log_probabilities = torch.log_softmax(logits, -1)
            chosen = log_probabilities.gather(-1, target[:, None])[:, 0]
            loss = loss - (chosen * share).sum()
            correct = correct + ((logits.argmax(-1) == target).to(torch.float32) * share).sum()
            minus_one = torch.full_like(share, -1.0)[:, None]
            slope = log_probabilities.exp().scatter_add(-1, target[:, None], minus_one)
            slopes.append((slope @ head) * share[:, None])
        ctx.save_for_backward(torch.cat(slopes)[:count])
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0], None, None, None, None


def _filled(values: torch.Tensor, count: int) -> torch.Tensor:
    """Append `count` zeros on the first axis."""
    return torch.cat([values, values.new_zeros((count, *values.shape[1:]))])


def _hidden(
    family: LanguageModel, head: torch.nn.Module, run: BoundNetwork, inputs: Batch
) -> torch.Tensor:
    """Run the network up to its head."""
    forward = head.forward
    head.forward = lambda hidden: hidden
    try:
        return family.logits(run, inputs)
    finally:
        head.forward = forward


def _head(adapted: AdaptedModel) -> torch.nn.Module:
    core: Any = adapted.network.get_base_model()  # type: ignore[operator] # PEFT's
    head = core.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ConfigError(
            "loss_pieces",
            f"expected a head of one frozen matrix without a bias, found {type(head).__name__}",
        )
    return head


def _frozen_name(adapted: AdaptedModel, head: torch.nn.Module) -> str:
    parameters = dict(adapted.network.named_parameters())
    for name in adapted.frozen:
        if parameters.get(name) is head.weight:
            return name
    raise ConfigError("loss_pieces", "expected a frozen head, found one that is trained")
