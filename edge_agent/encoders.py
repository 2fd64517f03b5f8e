"""Texts to token ids, as a plan's tokenizer cuts them."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from fedloom.errors import Reason, Refused
from fedloom.plans import TOKENIZER_FILE
from fedloom.tasks import CausalLanguageModelling, TextClassification

_TOKENISED_AT_ONCE = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


def checked_text(given: object) -> str:
    """Return a text as it came in JSON, if it is one; raises Refused(MALFORMED)."""
    if not isinstance(given, str):
        raise Refused(Reason.MALFORMED, f"expected a text, found {type(given).__name__}")
    if _SURROGATE.search(given):  # JSON can spell half a pair, which no encoding has
        raise Refused(Reason.MALFORMED, "expected a text, found half a character")
    return given


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a plan's tokenizer; raises Refused(PLAN_UNSUPPORTED)."""
    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more specific
        raise Refused(
            Reason.PLAN_UNSUPPORTED, f"expected {TOKENIZER_FILE} to load: {str(error)[:200]}"
        ) from error


class TextEncoder:
    """Texts to token ids, cut to the task's `max_tokens`."""

    def __init__(self, folder: Path, task: TextClassification | CausalLanguageModelling) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.no_padding()
        # A prompt is never cut: it would be another one.
        if isinstance(task, CausalLanguageModelling):
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(task.max_tokens)
        self._pad_token_id = task.pad_token_id

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield each text's ids; a text without any becomes one padding token that counts."""
        remaining = iter(texts)
        while block := list(itertools.islice(remaining, _TOKENISED_AT_ONCE)):
            for encoding in self._tokenizer.encode_batch(block):
                yield encoding.ids or [self._pad_token_id]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids that an answer to this prompt follows, not cut."""
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        return self._beginning() + ids

    def decode(self, ids: list[int], /) -> str:
        """Return the text of ids; special tokens are none."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _beginning(self) -> list[int]:
        """Return the special tokens that the tokenizer puts before a text, and none after it."""
        encoding = self._tokenizer.encode("a")
        special = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token for token, _ in itertools.takewhile(lambda pair: pair[1] == 1, special)]
