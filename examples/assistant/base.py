"""The operator's base: a small Llama, trained for a minute on public text, as a folder of
Hugging Face files. Nothing is downloaded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from torch.nn.functional import cross_entropy

from coordinator.plans.checkpoints import quiet_transformers
from coordinator.plans.parity import one_thread

_SPECIAL = ("<pad>", "<s>", "</s>")
_PAD, _BEGIN, _END = range(3)
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How large the base is and how long it learns."""

    steps: int = 1500
    batch: int = 16
    learning_rate: float = 4e-3
    vocabulary: int = 1200
    width: int = 96
    layers: int = 3
    seed: int = 0


def save_base(
    pairs: Sequence[tuple[str, str]],
    further: Sequence[str],
    folder: Path,
    recipe: Recipe,
    report: Callable[[str], None],
) -> None:
    """Train on (prompt, answer) pairs and save model and tokenizer; `further` is for the latter."""
    tokenizer = _tokenizer([*(p + a for p, a in pairs), *further], recipe.vocabulary)
    with torch.random.fork_rng(devices=[]), one_thread(), quiet_transformers():
        torch.manual_seed(recipe.seed)
        model = transformers.LlamaForCausalLM(_config(recipe, tokenizer.get_vocab_size()))
        report(f"{sum(p.numel() for p in model.parameters()):,} values, random")
        rows = [[*tokenizer.encode(prompt + answer).ids, _END] for prompt, answer in pairs]
        _train(model, rows, recipe, report)
        model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(_NAMES, _SPECIAL, strict=True))
    ).save_pretrained(folder)


_NAMES = ("pad_token", "bos_token", "eos_token")


def _tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", _BEGIN)]
    )
    return tokenizer


def _config(recipe: Recipe, vocabulary: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=_PAD,
        bos_token_id=_BEGIN,
        eos_token_id=_END,
    )


def _train(
    model: transformers.LlamaForCausalLM,
    rows: Sequence[list[int]],
    recipe: Recipe,
    report: Callable[[str], None],
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.01)
    for step in range(recipe.steps):
        rate = recipe.learning_rate * min(1, (step + 1) / 30)
        rate *= 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen = torch.randint(0, len(rows), (recipe.batch,)).tolist()
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[i]) for i in chosen], batch_first=True, padding_value=_PAD
        )
        logits = model(input_ids=ids, attention_mask=(ids != _PAD).long()).logits
        targets = torch.where(ids == _PAD, _IGNORED, ids)[:, 1:]
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=_IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            report(f"step {step}: loss {loss.item():.3f}")
