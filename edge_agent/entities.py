"""Words of a text with their places, and the entities that B-/I- tags make of them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OUTSIDE = "O"
_WORD = re.compile(r"\w+(?:[-'\N{RIGHT SINGLE QUOTATION MARK}]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Word:
    """A word as the model reads it; places count characters."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Entity:
    """Some words of one kind: `text[start:end]`; the probability is its least sure word's."""

    label: str
    start: int
    end: int
    text: str
    probability: float


def split_words(text: str) -> list[Word]:
    """Cut a text as corpora of entities are cut: words, and each punctuation mark by itself."""
    return [Word(match[0], match.start(), match.end()) for match in _WORD.finditer(text)]


def merge_tags(text: str, tags: Iterable[tuple[Word, str, float]]) -> Iterator[Entity]:
    """Yield the entities of tagged words, in order.

    B-x begins an x and I-x goes on with it; an I-x that follows no x begins one, as evaluations of
    such tags have it (CoNLL-2000's conlleval). Tags without B- or I- are kinds: equal neighbours
    are one entity.
    """
    kind, words, least = OUTSIDE, list[Word](), 1.0
    for word, tag, probability in tags:
        prefix, _, name = tag.partition("-")
        named = prefix in ("B", "I") and bool(name)
        found = name if named else tag
        if words and (found != kind or (named and prefix == "B")):
            yield _entity(text, kind, words, least)
            words, least = [], 1.0
        kind = found
        if kind != OUTSIDE:
            words.append(word)
            least = min(least, probability)
    if words:
        yield _entity(text, kind, words, least)


def _entity(text: str, kind: str, words: list[Word], least: float) -> Entity:
    start, end = words[0].start, words[-1].end
    return Entity(kind, start, end, text[start:end], least)
