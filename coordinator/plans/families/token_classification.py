"""Words in, one of some labels out for each: a BERT-like encoder with a head for every token."""

from typing import Any

import torch
import transformers

from coordinator.plans.checkpoints import token_count
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
from fedloom.tasks import IGNORED_LABEL, TokenClassification


def load_token_classifier(request: PlanRequest, source: ModelSource) -> AdaptedModel:
    """Load an encoder and give it a head for the request's labels."""
    auto = transformers.AutoModelForTokenClassification
    kind = "token-classification or encoder"
    loaded = load_classifier(source, auto, kind, len(request.labels))
    checkpoint = with_encoder_head(loaded)
    max_tokens = token_count(request.max_tokens, DEFAULT_TOKENS, checkpoint.model)
    adapted = adapt(checkpoint, request, source, HEAD, "TOKEN_CLS")
    tokenizer = load_tokenizer(source, checkpoint.model.config.vocab_size)
    padding = require_pad_token(tokenizer, source)
    task = TokenClassification(request.labels, max_tokens, padding)
    return adapted.model(TokenClassifier(adapted.network, task), tokenizer)


class TokenClassifier(Encoder):
    """An encoder with a label for each token; what follows a word's first token is not learned."""

    def __init__(self, network: Any, task: TokenClassification) -> None:
        super().__init__(network)
        self.task = task

    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """See Family."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.example_tokens(batch, sequence, generator)
        shape = (batch, sequence)
        labels = torch.randint(0, self.classes, shape, generator=generator)
        learned = torch.rand(shape, generator=generator) < 0.6
        learned &= tokens["attention_mask"].bool()
        return {
            **tokens,
            "labels": torch.where(learned, labels, IGNORED_LABEL),
            "sample_weight": example_weight(batch, generator),
        }

    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """See Family; the mask as every user of the library gives it."""
        labels = batch["labels"]
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = network(**tokens).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL
        )
        weights = batch["sample_weight"][:, None] * (labels != IGNORED_LABEL)
        correct = ((logits.argmax(-1) == labels) * weights).sum()
        return Sums((losses * weights).sum(), weights.sum(), correct), logits
