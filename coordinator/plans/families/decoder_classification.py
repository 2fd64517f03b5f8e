"""Text in, one of some labels out: a decoder whose head reads the last token of each text."""

from typing import Any

import torch
from torch.func import functional_call

from coordinator.plans.checkpoints import Checkpoint, position_limit, token_count
from coordinator.plans.families.decoders import (
    bands,
    causal_arguments,
    causal_bands,
    example_rows,
)
from coordinator.plans.families.encoders import DEFAULT_TOKENS, example_weight
from coordinator.plans.lora import adapt
from coordinator.plans.losses import cross_entropy_sums
from coordinator.plans.model import AdaptedModel, Batch, BoundNetwork, Family, Sums
from coordinator.plans.request import PlanRequest
from coordinator.plans.sources import ModelSource
from coordinator.plans.tokenization import load_tokenizer
from fedloom.tasks import TextClassification

DECODER_HEAD = "score"


def load_decoder_classifier(
    request: PlanRequest, source: ModelSource, checkpoint: Checkpoint
) -> AdaptedModel:
    """Give a loaded decoder a head for the request's labels."""
    model = checkpoint.model
    max_tokens = token_count(request.max_tokens, DEFAULT_TOKENS, model)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    # The mask hides padding, so that any token will do where the model has none.
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # transformers finds the last token by it, and refuses batches without.
    model.config.pad_token_id = padding
    whole = Checkpoint(model, frozenset({DECODER_HEAD, *checkpoint.lacking}))
    adapted = adapt(whole, request, source, DECODER_HEAD, "SEQ_CLS")
    task = TextClassification(request.labels, max_tokens, padding)
    return adapted.model(DecoderClassifier(adapted.network, task), tokenizer)


class DecoderClassifier(Family):
    """A decoder with one label for a text: what its last token that is no padding says."""

    task: TextClassification

    def __init__(self, network: Any, task: TextClassification) -> None:
        """`network` is PEFT's model."""
        core = network.get_base_model()
        self.task = task
        self._config = core.config
        self._longest = position_limit(core)
        self._bands = causal_bands(network)
        self._last_token = _LastToken(network)

    @property
    def longest(self) -> int | None:
        """See Family."""
        return self._longest

    def extents(self) -> set[int]:
        """See Family."""
        found = {value for value in self._config.to_dict().values() if isinstance(value, int)}
        heads = getattr(self._config, "num_attention_heads", 1)
        size = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        return found | {len(self.task.labels), size}

    def logits(self, run: BoundNetwork, inputs: Batch) -> torch.Tensor:
        """Run the network; the last token comes from the mask, whatever the padding's id is."""
        keys = inputs["attention_mask"].shape[1]
        values = {**run.values, **bands(self._bands, keys)}
        named = {f"{_LastToken.INNER}.{name}": value for name, value in values.items()}
        arguments = causal_arguments(inputs)
        logits: torch.Tensor = functional_call(
            self._last_token, named, (inputs["attention_mask"],), {"arguments": arguments}
        )
        return logits

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
        """See Family."""
        return cross_entropy_sums(logits, labels, weight)

    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """See Family; no text has the padding's token, by which transformers finds its end."""
        generator = torch.Generator().manual_seed(seed)
        padding, vocabulary = self.task.pad_token_id, self._config.vocab_size
        tokens = example_rows(batch, sequence, vocabulary, generator)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        ids = torch.where(ids == padding, (padding + 1) % vocabulary, ids)
        return {
            "input_ids": torch.where(mask == 1, ids, padding),
            "attention_mask": mask,
            "labels": torch.randint(0, len(self.task.labels), (batch,), generator=generator),
            "sample_weight": example_weight(batch, generator),
        }

    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """See Family; the mask as every user of the library gives it."""
        labels, weight = batch["labels"], batch["sample_weight"]
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = network(**tokens, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        correct = ((logits.argmax(-1) == labels) * weight).sum()
        return Sums((losses * weight).sum(), weight.sum(), correct), logits


class _LastToken(torch.nn.Module):
    """The core of PEFT's model and its head, applied to one position of each row."""

    INNER = "network"

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, mask: torch.Tensor, *, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        """`mask` is (B, S); a row without any token is read at its first position."""
        model: Any = self.network.get_base_model()
        core = getattr(model, model.base_model_prefix)
        hidden = core(**arguments, use_cache=False).last_hidden_state  # (B, S, H)
        positions = torch.arange(mask.shape[1])
        last = (positions * mask).amax(1)  # (B,)
        chosen = (positions == last[:, None]).to(hidden.dtype)  # (B, S), one 1 in each row
        logits: torch.Tensor = getattr(model, DECODER_HEAD)(
            torch.bmm(chosen[:, None], hidden)[:, 0]
        )
        return logits
