"""Texts to token ids, as a plan's tokenizer cuts them."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tokenizers import Encoding, Tokenizer

from fedloom.errors import Reason, Refused
from fedloom.plans import TOKENIZER_FILE
from fedloom.tasks import (
    IGNORED_LABEL,
    CausalLanguageModelling,
    TextClassification,
    TokenClassification,
)

_TOKENISED_AT_ONCE = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")
_CHARACTERS_AT_ONCE = 1 << 20  # bounds the memory that a block of long texts takes
TextTask = TextClassification | TokenClassification | CausalLanguageModelling
_T = TypeVar("_T")


class Encoded(NamedTuple):
    """A row's token ids and labels; `cut` says whether `max_tokens` has cut it."""

    ids: list[int]
    labels: list[int]
    cut: bool


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

    def __init__(self, folder: Path, task: TextTask) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._task = task
        self._tokenizer.no_padding()
        # A prompt is cut together with its answer, not alone.
        if isinstance(task, CausalLanguageModelling):
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(task.max_tokens)

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield each text's ids; a text without any becomes one padding token that counts."""
        for encoded in self.classified((text, IGNORED_LABEL) for text in texts):
            yield encoded.ids

    def classified(self, rows: Iterable[tuple[str, int]]) -> Iterator[Encoded]:
        """Yield the ids of each row's text, as `ids`; its class is the only label."""
        for block in _blocks(rows, lambda row: len(row[0])):
            encodings = self._tokenizer.encode_batch([text for text, _ in block])
            for (_, label), encoding in zip(block, encodings, strict=True):
                ids = encoding.ids or [self._task.pad_token_id]
                yield Encoded(ids, [label], bool(encoding.overflowing))

    def tagged(self, rows: Iterable[tuple[Sequence[str], Sequence[int]]]) -> Iterator[Encoded]:
        """Yield the ids of each row's words; a word's first token has its tag as label."""
        for block in _blocks(rows, lambda row: sum(map(len, row[0]))):
            words = [list(row[0]) for row in block]
            encodings = self._tokenizer.encode_batch(words, is_pretokenized=True)
            for (_, tags), encoding in zip(block, encodings, strict=True):
                ids = encoding.ids or [self._task.pad_token_id]
                labels = _first_token_labels(encoding, tags) or [IGNORED_LABEL]
                yield Encoded(ids, labels, bool(encoding.overflowing))

    def answered(self, rows: Iterable[tuple[str, str]]) -> Iterator[Encoded]:
        """Yield the ids of each row's prompt and answer; only the answer's are labels.

        The prompt has the tokens that it has alone, as when a device is asked for an answer. The
        first stop token follows the answer.
        """
        task = self._task
        stop = list(task.stop_token_ids[:1]) if isinstance(task, CausalLanguageModelling) else []
        beginning = self._beginning()
        for block in _blocks(rows, lambda row: 2 * len(row[0]) + len(row[1])):
            texts = [text for prompt, answer in block for text in (prompt, prompt + answer)]
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            for (_, answer), alone, whole in zip(
                block, encodings[::2], encodings[1::2], strict=True
            ):
                given = beginning + alone.ids
                learned = self._continuation(alone.ids, whole.ids, answer) + stop
                ids = (given + learned)[: task.max_tokens]
                labels = ([IGNORED_LABEL] * len(given) + learned)[: task.max_tokens]
                yield Encoded(ids, labels, len(given) + len(learned) > len(ids))

    def _continuation(self, prompt: list[int], whole: list[int], answer: str) -> list[int]:
        """Return an answer's ids as they follow its prompt's, or its own where they cannot.

        A tokenizer may put a blank before every text, and the answer is none of its own; or have a
        token for the prompt's last characters together with the answer's first.
        """
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        ids: list[int] = self._tokenizer.encode(answer, add_special_tokens=False).ids
        return ids

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


def _first_token_labels(encoding: Encoding, tags: Sequence[int]) -> list[int]:
    labels, before = [], None
    for word in encoding.word_ids:
        labels.append(IGNORED_LABEL if word is None or word == before else tags[word])
        before = word
    return labels


def _blocks(rows: Iterable[_T], size: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Cut rows into blocks that are worth the tokenizer's threads and bound its memory."""
    block: list[_T] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += size(row)
        if len(block) == _TOKENISED_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield block
            block, characters = [], 0
    if block:
        yield block
