"""What BERT-like encoders have in common, whatever head they carry."""

import inspect
from typing import Any

import torch
import transformers

from coordinator.plans.checkpoints import (
    Checkpoint,
    load_checkpoint,
    padding_position,
    position_limit,
)
from coordinator.plans.families.decoders import MASKED
from coordinator.plans.losses import cross_entropy_sums
from coordinator.plans.model import Batch, BoundNetwork, Family, Sums
from coordinator.plans.sources import ModelSource
from fedloom.errors import ConfigError

HEAD = "classifier"
DEFAULT_TOKENS = 64


class Encoder(Family):
    """An encoder whose logits are class scores."""

    def __init__(self, network: Any) -> None:
        """`network` is PEFT's model."""
        core = network.get_base_model()
        self._accepted = frozenset(inspect.signature(core.forward).parameters)
        self._counts_from_padding = padding_position(core) is not None
        self._config = core.config
        self._longest = position_limit(core)

    @property
    def longest(self) -> int | None:
        """See Family."""
        return self._longest

    def extents(self) -> set[int]:
        """See Family."""
        found = {value for value in self._config.to_dict().values() if isinstance(value, int)}
        heads = getattr(self._config, "num_attention_heads", 1)
        return found | {self._config.num_labels, self._config.hidden_size // heads}

    def logits(self, run: BoundNetwork, inputs: Batch) -> torch.Tensor:
        """Run the network.

        The mask is given in its final additive form and positions are explicit: transformers' own
        helpers look at the mask's values, which no graph can follow.
        """
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        additive = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED
        arguments = {"input_ids": input_ids, "attention_mask": additive}  # (B, S), (B, 1, 1, S)
        if "token_type_ids" in self._accepted:
            arguments["token_type_ids"] = torch.zeros_like(input_ids)
        if "position_ids" in self._accepted and not self._counts_from_padding:
            arguments["position_ids"] = torch.arange(input_ids.shape[1])[None]
        logits: torch.Tensor = run(**arguments).logits
        return logits

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
        """See Family."""
        return cross_entropy_sums(logits, labels, weight)

    def example_tokens(self, batch: int, sequence: int, generator: torch.Generator) -> Batch:
        """Make token ids, and a mask with holes and an empty last row."""
        shape = (batch, sequence)
        mask = (torch.rand(shape, generator=generator) < 0.8).long()
        mask[:, 0] = 1
        mask[-1] = 0
        ids = torch.randint(0, self._config.vocab_size, shape, generator=generator)
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def classes(self) -> int:
        """C: number of labels."""
        return int(self._config.num_labels)


def example_weight(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Make unequal weights (B,), the last one 0."""
    weight = 0.5 + torch.rand(batch, generator=generator)
    weight[-1] = 0.0
    return weight


def load_classifier(source: ModelSource, auto: Any, kind: str, labels: int) -> Checkpoint:
    """Load a model with a new head for so many labels."""
    return load_checkpoint(
        source,
        auto,
        kind,
        num_labels=labels,
        ignore_mismatched_sizes=True,  # a head with another number of labels
    )


def with_encoder_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose head, called HEAD, is new; raises ConfigError without such one."""
    model: transformers.PreTrainedModel = checkpoint.model
    if not hasattr(model, HEAD):
        raise ConfigError(
            "model", f"expected a module called {HEAD} as its head, found {type(model).__name__}"
        )
    others = {name for name in checkpoint.lacking if name.partition(".")[0] != HEAD}
    return Checkpoint(model, frozenset({HEAD, *others}))
