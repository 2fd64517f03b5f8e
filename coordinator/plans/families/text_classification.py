"""Text in, one of some labels out: an encoder or a decoder with a classification head."""

from typing import Any

import torch
import transformers

from coordinator.plans.checkpoints import token_count
from coordinator.plans.families.decoder_classification import (
    DECODER_HEAD,
    load_decoder_classifier,
)
from coordinator.plans.families.encoders import (
    DEFAULT_TOKENS,
    HEAD,
    Encoder,
    example_weight,
    load_classifier,
    with_encoder_head,
)
from coordinator.plans.lora import adapt
from coordinator.plans.model import AdaptedModel, Batch, Sums
from coordinator.plans.request import PlanRequest
from coordinator.plans.sources import ModelSource
from coordinator.plans.tokenization import load_tokenizer, require_pad_token
from fedloom.tasks import TextClassification


def load_text_classifier(request: PlanRequest, source: ModelSource) -> AdaptedModel:
    """Load an encoder or a decoder and give it a head for the request's labels."""
    auto = transformers.AutoModelForSequenceClassification
    kind = "sequence-classification or encoder"
    loaded = load_classifier(source, auto, kind, len(request.labels))
    if hasattr(loaded.model, DECODER_HEAD):
        return load_decoder_classifier(request, source, loaded)
    checkpoint = with_encoder_head(loaded)
    max_tokens = token_count(request.max_tokens, DEFAULT_TOKENS, checkpoint.model)
    adapted = adapt(checkpoint, request, source, HEAD, "SEQ_CLS")
    tokenizer = load_tokenizer(source, checkpoint.model.config.vocab_size)
    padding = require_pad_token(tokenizer, source)
    task = TextClassification(request.labels, max_tokens, padding)
    return adapted.model(TextClassifier(adapted.network, task), tokenizer)


class TextClassifier(Encoder):
    """An encoder with one label for a text."""

    def __init__(self, network: Any, task: TextClassification) -> None:
        super().__init__(network)
        self.task = task

    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """See Family."""
        generator = torch.Generator().manual_seed(seed)
        return {
            **self.example_tokens(batch, sequence, generator),
            "labels": torch.randint(0, self.classes, (batch,), generator=generator),
            "sample_weight": example_weight(batch, generator),
        }

    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """See Family; the mask as every user of the library gives it."""
        labels, weight = batch["labels"], batch["sample_weight"]
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = network(**tokens).logits
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        correct = ((logits.argmax(-1) == labels) * weight).sum()
        return Sums((losses * weight).sum(), weight.sum(), correct), logits
