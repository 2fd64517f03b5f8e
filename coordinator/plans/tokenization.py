"""The tokenizer of a plan: what lies beside the model, without truncation and padding."""

from dataclasses import dataclass

import tokenizers
import transformers
from transformers.utils.hub import cached_file

from coordinator.plans.sources import ModelSource
from fedloom.errors import ConfigError
from fedloom.plans import TOKENIZER_FILE


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer in the format of Hugging Face tokenizers, and its ids for filling and ending."""

    text: str
    pad_token_id: int | None
    end_token_id: int | None


def load_tokenizer(source: ModelSource, vocabulary: int) -> TextTokenizer:
    """Load the model's tokenizer without truncation and padding, which are the agent's choice.

    `vocabulary` is the number of rows of the embedding.
    """
    try:
        path = cached_file(source.location, TOKENIZER_FILE) or ""  # None only where asked for
        loaded = transformers.AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model",
            f"expected {TOKENIZER_FILE} beside the model {source.name}; an older tokenizer gets "
            "one from transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ) from error
    tokenizer = tokenizers.Tokenizer.from_file(path)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocabulary:
        raise ConfigError(
            "model",
            f"expected a tokenizer of at most {vocabulary} tokens (the embedding's rows), "
            f"found {size}",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(tokenizer.to_str(), loaded.pad_token_id, loaded.eos_token_id)


def require_pad_token(tokenizer: TextTokenizer, source: ModelSource) -> int:
    """Return the id that fills short rows; raises ConfigError when there is none."""
    if tokenizer.pad_token_id is None:
        raise ConfigError("model", f"expected the tokenizer of {source.name} to have a pad token")
    return tokenizer.pad_token_id
