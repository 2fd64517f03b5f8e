"""The functions that become graphs: pure in theta, a batch and the frozen weights.

So a graph depends on the model's configuration and on nothing that was learned. Contracts:
`fedloom.graph_contracts`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from coordinator.plans.families.causal_lm import LanguageModel
from coordinator.plans.model import AdaptedModel
from fedloom.graph_contracts import (
    GraphContract,
    Port,
    eval_contract,
    gen_contract,
    infer_contract,
    train_contract,
)

_PRIMES = (19, 23, 29, 31, 37, 41, 17, 13, 11, 7)

Step = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Trace:
    """One function to be traced, and the graphs that remain of it when less is asked for.

    `example` are its arguments before the frozen weights, by name. Its results are the outputs of
    all `graphs`, each once, in order of their first appearance.
    """

    step: Step
    example: dict[str, torch.Tensor]
    graphs: tuple[GraphContract, ...]

    @property
    def inputs(self) -> dict[str, Port]:
        """Ports of the arguments."""
        ports = {n: port for graph in self.graphs for n, port in graph.inputs.items()}
        return {name: ports[name] for name in self.example}

    @property
    def outputs(self) -> list[str]:
        """Names of the results."""
        return list(dict.fromkeys(name for graph in self.graphs for name in graph.outputs))


def training_trace(adapted: AdaptedModel) -> Trace:
    """Return one trace for training, evaluation and inference."""
    count = len(adapted.theta)
    return Trace(
        training_step(adapted),
        {"theta": torch.from_numpy(adapted.theta), **example_batch(adapted)},
        (
            train_contract(adapted.task, count, adapted.trained_count),
            eval_contract(adapted.task, count),
            infer_contract(adapted.task, count),
        ),
    )


def generation_trace(adapted: AdaptedModel, family: LanguageModel) -> Trace:
    """Return what to trace for the next token's logits."""
    batch, sequence = example_shape(adapted)
    past = free_extent(adapted, (11, 7, 13), but=(batch, sequence))
    while not is_free(adapted, sequence + past):
        past = free_extent(adapted, (), but=(*range(past + 1), batch, sequence))
    generator = torch.Generator().manual_seed(0)
    example = {"theta": torch.from_numpy(adapted.theta)}
    vocabulary = family.task.vocabulary_size
    example["input_ids"] = torch.randint(0, vocabulary, (batch, sequence), generator=generator)
    example["attention_mask"] = torch.ones(batch, past + sequence, dtype=torch.int64)
    contract = gen_contract(family.task, len(adapted.theta))
    cache_shape = (batch, family.task.heads, past, family.task.head_size)
    for name in contract.inputs:
        if name not in example:
            example[name] = torch.randn(cache_shape, generator=generator)
    return Trace(generation_step(adapted, family), example, (contract,))


def generation_step(adapted: AdaptedModel, family: LanguageModel) -> Step:
    """Return a step: (theta, ids (B, S), mask (B, T + S), past, frozen) -> (logits, present)."""
    past_count = 2 * family.task.layers

    def step(
        theta: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        run = adapted.bound(cut(adapted, theta), rest[past_count:])
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        return family.next_logits(run, tokens, rest[:past_count])

    return step


def training_step(adapted: AdaptedModel) -> Step:
    """Return a step with its gradient: (theta (P,), inputs, labels, weight (B,), frozen)."""
    names = list(adapted.family.example(2, 2, seed=0))

    def step(theta: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, frozen = dict(zip(names, rest, strict=False)), rest[len(names) :]
        labels, weight = batch.pop("labels"), batch.pop("sample_weight")
        with torch.enable_grad():
            pieces, rest_of_theta = leaves(adapted, theta)
            logits = adapted.family.logits(adapted.bound([*pieces, *rest_of_theta], frozen), batch)
            sums = adapted.family.sums(logits, labels, weight)
            gradients = torch.autograd.grad(sums.loss, pieces)
        grad_sum = torch.cat([gradient.reshape(-1) for gradient in gradients])
        found = (sums.loss, sums.weight, sums.correct, grad_sum, logits)
        return tuple(value.detach() for value in found)

    return step


def example_batch(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Make the batch that is traced with."""
    return adapted.family.example(*example_shape(adapted), seed=0)


def example_shape(adapted: AdaptedModel) -> tuple[int, int]:
    """Choose a batch and a sequence length to trace with.

    Neither may equal an extent of the model: the tracer tells extents apart by their size.
    """
    limit = adapted.family.longest or max(_PRIMES)
    sequence = free_extent(adapted, _PRIMES, most=limit)
    return free_extent(adapted, (3, 5, *_PRIMES), but=(sequence,)), sequence


def free_extent(
    adapted: AdaptedModel,
    choices: tuple[int, ...],
    but: tuple[int, ...] = (),
    most: int = max(_PRIMES),
) -> int:
    """Return the first of `choices`, or any number up to `most`, that is no extent of the model."""
    candidates = itertools.chain(choices, range(3, most + 1))
    free = (n for n in candidates if n <= most and n not in but and is_free(adapted, n))
    return next(free, most)  # parity tells whether that does


def is_free(adapted: AdaptedModel, extent: int) -> bool:
    """Tell whether no part of the model has such an extent."""
    taken = {size for tensor in adapted.network.parameters() for size in tensor.shape}
    return extent not in taken | adapted.family.extents()


def leaves(
    adapted: AdaptedModel, theta: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors of theta (P,) that have a gradient, as its leaves, and the residuals."""
    pieces, count = cut(adapted, theta), adapted.trained_tensors
    return [piece.detach().requires_grad_() for piece in pieces[:count]], pieces[count:]


def cut(adapted: AdaptedModel, theta: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that theta (P,) consists of."""
    pieces = torch.split(theta, [tensor.size for tensor in adapted.layout])
    return [p.view(t.shape) for p, t in zip(pieces, adapted.layout, strict=True)]
