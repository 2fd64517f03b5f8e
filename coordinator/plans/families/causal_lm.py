"""Text in, its continuation out: decoders such as Llama, Qwen, GPT-2, GPT-Neo and GPT-NeoX."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from coordinator.plans.checkpoints import load_checkpoint, position_limit, token_count
from coordinator.plans.families.decoders import (
    bands,
    causal_arguments,
    causal_bands,
    example_rows,
)
from coordinator.plans.families.encoders import example_weight
from coordinator.plans.lora import adapt
from coordinator.plans.losses import cross_entropy_sums
from coordinator.plans.model import AdaptedModel, Batch, BoundNetwork, Family, Sums
from coordinator.plans.request import PlanRequest
from coordinator.plans.sources import ModelSource
from coordinator.plans.tokenization import TextTokenizer, load_tokenizer
from fedloom.errors import ConfigError
from fedloom.tasks import IGNORED_LABEL, MAX_STOP_TOKENS, CausalLanguageModelling

_DEFAULT_TOKENS = 256
_NONE = IGNORED_LABEL


def load_language_model(request: PlanRequest, source: ModelSource) -> AdaptedModel:
    """Load a decoder; its head is the checkpoint's."""
    checkpoint = load_checkpoint(
        source, transformers.AutoModelForCausalLM, "causal language model's"
    )
    model = checkpoint.model
    if checkpoint.lacking:
        raise ConfigError(
            "model",
            f"expected a checkpoint of {type(model).__name__}; it lacks the weights of "
            f"{min(checkpoint.lacking)}",
        )
    max_tokens = token_count(request.max_tokens, _DEFAULT_TOKENS, model)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    head = _head_name(model)
    adapted = adapt(checkpoint, request, source, head, "CAUSAL_LM")
    layers, heads, head_size, vocabulary = _extents(adapted.network)
    ends = _stop_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id
    task = CausalLanguageModelling(
        max_tokens=max_tokens,
        # The mask hides padding, so that any token will do.
        pad_token_id=(*ends, 0)[0] if padding is None else padding,
        vocabulary_size=vocabulary,
        layers=layers,
        heads=heads,
        head_size=head_size,
        prompt=request.prompt,
        answer=request.answer,
        stop_token_ids=ends,
    )
    family = LanguageModel(adapted.network, task, request.loss_pieces)
    return adapted.model(family, tokenizer)


class LanguageModel(Family):
    """A decoder with a key-value cache."""

    task: CausalLanguageModelling

    def __init__(self, network: Any, task: CausalLanguageModelling, loss_pieces: int = 1) -> None:
        """`network` is PEFT's model; its head is made to see rows of hidden states.

        In `train.onnx` head and loss take so many pieces of the rows one after the other.
        """
        self.loss_pieces = loss_pieces
        core = network.get_base_model()
        self.task = task
        self._config = core.config
        self._longest = position_limit(core)
        self._bands = causal_bands(network)
        _apply_to_rows(core.get_output_embeddings())

    @property
    def longest(self) -> int | None:
        """See Family."""
        return self._longest

    def extents(self) -> set[int]:
        """See Family."""
        found = {value for value in self._config.to_dict().values() if isinstance(value, int)}
        return found | {self.task.heads, self.task.head_size, self.task.layers}

    def logits(self, run: BoundNetwork, inputs: Batch) -> torch.Tensor:
        """Run the network on whole texts."""
        logits: torch.Tensor = self._run(run, inputs, 0, use_cache=False).logits
        return logits

    def next_logits(
        self, run: BoundNetwork, inputs: Batch, past: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the last position's logits (B, V) and the grown cache.

        `past` are key and value of each layer in turn, (B, H, T, D); the mask is of T + S tokens.
        """
        cache = DynamicCache()
        for layer in range(self.task.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        output = self._run(run, inputs, past[0].shape[2], **options)
        grown = output.past_key_values.layers
        present = [value for layer in grown for value in (layer.keys, layer.values)]
        return output.logits[:, -1], *present

    def _run(self, run: BoundNetwork, inputs: Batch, before: int, **options: object) -> Any:
        """Run the network; `before` is T, the number of tokens in the cache."""
        keys = inputs["attention_mask"].shape[1]
        placed = run.having(bands(self._bands, keys))
        return placed(**causal_arguments(inputs, before), **options)

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
        """Compare each position with the label of the next one.

        The labels move, not the logits: a copy of those would be the largest array of all.
        """
        nothing = torch.full_like(labels[:, :1], _NONE)
        return cross_entropy_sums(logits, torch.cat([labels[:, 1:], nothing], 1), weight)

    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """See Family; rows of any length, in which some tokens are not learned."""
        generator = torch.Generator().manual_seed(seed)
        tokens = example_rows(batch, sequence, self.task.vocabulary_size, generator)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        learned = (torch.rand(ids.shape, generator=generator) < 0.7) & mask.bool()
        return {
            **tokens,
            "labels": torch.where(learned, ids, _NONE),
            "sample_weight": example_weight(batch, generator),
        }

    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """See Family; the mask as every user of the library gives it."""
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = network(**tokens, use_cache=False).logits
        targets = batch["labels"][:, 1:]  # (B, S - 1)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=_NONE
        )
        weights = batch["sample_weight"][:, None] * (targets != _NONE)
        correct = ((logits[:, :-1].argmax(-1) == targets) * weights).sum()
        return Sums((losses * weights).sum(), weights.sum(), correct), logits


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    if head is None or not names:
        raise ConfigError(
            "model",
            f"expected a head over the vocabulary, found none in {type(model).__name__}",
        )
    return str(names[0])


def _extents(network: Any) -> tuple[int, int, int, int]:
    """Run two tokens; return the cache's layers, heads and head size, and the number of logits."""
    with torch.no_grad():
        output = network(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    shapes = {tuple(t.shape) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ConfigError(
            "model",
            "expected a decoder whose layers all keep keys and values of one shape, "
            f"found {sorted(shapes) or 'no such cache'}",
        )
    ((_, heads, _, size),) = shapes
    return len(layers), heads, size, output.logits.shape[-1]


def _stop_tokens(model: Any, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: what the model says, or else its tokenizer."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    for found in (said, model.config.eos_token_id, tokenizer.end_token_id):
        if found is not None:
            return tuple(found if isinstance(found, list) else [found])[:MAX_STOP_TOKENS]
    return ()


def _apply_to_rows(head: torch.nn.Module) -> None:
    """Give a head the hidden states as rows of a matrix: one product with its weight as it lies.

    Of three-dimensional states that are not contiguous, the last ones of each text, torch makes
    copies of the weight, one for each row.
    """

    forward = head.forward

    def of_rows(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward(hidden.reshape(-1, hidden.shape[-1]))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    head.forward = of_rows
