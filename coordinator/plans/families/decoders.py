"""What decoders have in common: how they are run so that a graph can follow."""

from collections.abc import Mapping

import torch

from coordinator.plans.model import Batch

MASKED = torch.finfo(torch.float32).min  # added to the scores of positions that are not seen


def causal_arguments(inputs: Batch, before: int = 0) -> dict[str, torch.Tensor]:
    """Return ids, the mask in its final form and explicit positions.

    transformers' own helpers look at the mask's values, which no graph can follow. Positions
    count the tokens that are seen, so that a row means the same wherever its padding is.
    `before` is T, the number of tokens in the cache.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (B, S), (B, T + S)
    keys = torch.arange(mask.shape[1])
    queries = torch.arange(ids.shape[1]) + before
    earlier = keys[None, :] <= queries[:, None]  # (S, T + S)
    seen = earlier[None, None] & mask[:, None, None, :].to(torch.bool)
    return {
        "input_ids": ids,
        "attention_mask": torch.where(seen, 0.0, MASKED),  # (B, 1, S, T + S)
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, before:],
    }


def bands(widths: Mapping[str, int], keys: int) -> dict[str, torch.Tensor]:
    """Return the causal masks of `causal_bands` for so many positions."""
    return {name: _band(torch.arange(keys), width) for name, width in widths.items()}


def causal_bands(network: torch.nn.Module) -> Mapping[str, int]:
    """Return the width of every buffer that is a causal mask of all positions, by name.

    GPT-Neo has one in each layer, 4 MB at 2,048 positions: a graph computes them instead.
    """
    widths = {}
    for name, buffer in network.named_buffers():
        if buffer.dtype == torch.bool and buffer.dim() == 4 and buffer.shape[2] == buffer.shape[3]:
            width = int(buffer[0, 0, -1].sum())
            if torch.equal(buffer, _band(torch.arange(buffer.shape[2]), width)):
                widths[name] = width
    return widths


def example_rows(
    batch: int, sequence: int, vocabulary: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Make token ids, and a mask of rows of any length, the last one empty."""
    lengths = torch.randint(sequence // 2, sequence + 1, (batch, 1), generator=generator)
    lengths[0], lengths[-1] = sequence, 0
    mask = (torch.arange(sequence)[None] < lengths).long()
    ids = torch.randint(0, vocabulary, (batch, sequence), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def _band(keys: torch.Tensor, width: int) -> torch.Tensor:
    """Return which of the last `width` positions (K,) each one sees, itself included."""
    distance = keys[:, None] - keys[None, :]
    return ((distance >= 0) & (distance < width))[None, None]  # (1, 1, K, K)
