"""The function that becomes graphs: a training step with its gradient.

It is a pure function of `theta`, a batch and the frozen weights, so that a graph depends on the
model's configuration and on nothing that was learned. Contracts: `fedloom.graph_contracts`.
"""

import inspect
from collections.abc import Callable

import torch
from torch.func import functional_call

from coordinator.plans.model import AdaptedModel, counts_from_padding, position_limit

_MASKED = torch.finfo(torch.float32).min  # added to the scores of padded positions
_PRIMES = (19, 23, 29, 31, 37, 41, 17, 13, 11, 7)

Step = Callable[..., tuple[torch.Tensor, ...]]


def training_step(adapted: AdaptedModel) -> Step:
    """Return the function that is traced; its results are those of all graphs.

    `infer.onnx` keeps the last one of the trace, the logits; `eval.onnx` all but the gradient.
    """

    def step(
        theta: torch.Tensor,  # (P,) float32
        input_ids: torch.Tensor,  # (B, S) int64
        attention_mask: torch.Tensor,  # (B, S) int64, 0 or 1
        labels: torch.Tensor,  # (B,) int64
        sample_weight: torch.Tensor,  # (B,) float32
        *frozen: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            pieces = [piece.detach().requires_grad_() for piece in _cut(adapted, theta)]
            logits = _logits(adapted, pieces, frozen, input_ids, attention_mask)
            loss_sum = weighted_loss(logits, labels, sample_weight)
            gradients = torch.autograd.grad(loss_sum, pieces)
        logits = logits.detach()
        correct = ((logits.argmax(-1) == labels) * sample_weight).sum()
        grad_sum = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return loss_sum.detach(), sample_weight.sum(), correct, grad_sum, logits

    return step


def weighted_loss(
    logits: torch.Tensor, labels: torch.Tensor, sample_weight: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of cross-entropies, written out.

    Not `F.cross_entropy`: torch.onnx gives `nll_loss_forward` a wrong total weight, and the
    gradient comes out exactly negated.
    """
    log_probabilities = torch.log_softmax(logits, -1)  # (B, C)
    chosen = log_probabilities.gather(-1, labels[:, None])[:, 0]  # (B,)
    return -(chosen * sample_weight).sum()


def example_batch(
    adapted: AdaptedModel, batch: int, sequence: int, seed: int
) -> dict[str, torch.Tensor]:
    """Make a batch with holes in its mask, unequal weights and one empty row of weight 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, sequence)
    mask = (torch.rand(shape, generator=generator) < 0.8).long()
    mask[:, 0] = 1
    mask[-1] = 0
    weight = 0.5 + torch.rand(batch, generator=generator)
    weight[-1] = 0.0
    return {
        "input_ids": torch.randint(0, adapted.config.vocab_size, shape, generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(0, adapted.config.num_labels, (batch,), generator=generator),
        "sample_weight": weight,
    }


def example_shape(adapted: AdaptedModel) -> tuple[int, int]:
    """Choose a batch and a sequence length to trace with.

    Neither may equal an extent of the model: the tracer tells extents apart by their size.
    """
    taken = {extent for p in adapted.network.parameters() for extent in p.shape}
    taken |= {value for value in adapted.config.to_dict().values() if isinstance(value, int)}
    taken.add(adapted.config.num_labels)
    heads = getattr(adapted.config, "num_attention_heads", 1)
    taken.add(adapted.config.hidden_size // heads)
    limit = position_limit(adapted.network) or max(_PRIMES)
    sequence = next(n for n in _PRIMES if n not in taken and n <= limit)
    batch = next(n for n in (3, 5, *_PRIMES) if n not in taken and n != sequence)
    return batch, sequence


def _cut(adapted: AdaptedModel, theta: torch.Tensor) -> list[torch.Tensor]:
    pieces = torch.split(theta, [tensor.size for tensor in adapted.layout])
    return [p.view(t.shape) for p, t in zip(pieces, adapted.layout, strict=True)]


def _logits(
    adapted: AdaptedModel,
    pieces: list[torch.Tensor],
    frozen: tuple[torch.Tensor, ...],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Run the network with the given weights; (B, C) float32.

    The mask is given in its final additive form and positions are explicit: transformers' own
    helpers look at the mask's values, which no graph can follow.
    """
    parameters = dict(zip(adapted.trainable, pieces, strict=True))
    parameters |= dict(zip(adapted.frozen, frozen, strict=True))
    additive = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * _MASKED  # (B, 1, 1, S)
    arguments = {"input_ids": input_ids, "attention_mask": additive}
    core = adapted.network.get_base_model()  # type: ignore[operator] # PEFT's
    accepted = inspect.signature(core.forward).parameters
    if "token_type_ids" in accepted:
        arguments["token_type_ids"] = torch.zeros_like(input_ids)
    if "position_ids" in accepted and not counts_from_padding(core):
        arguments["position_ids"] = torch.arange(input_ids.shape[1])[None]
    output = functional_call(adapted.network, parameters, (), arguments)
    logits: torch.Tensor = output.logits
    return logits
