"""Replace personal data in texts before they are tokenised."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scrub:
    """Which kinds of personal data are replaced."""

    kinds: tuple[str, ...] = ()


NO_SCRUB = Scrub()


class Scrubber:
    """Replaces personal data, counting replacements by kind in `counts`."""

    def __init__(self, scrub: Scrub, counts: Counter[str]) -> None:
        self._scrub = scrub
        self._counts = counts

    def text(self, text: str) -> str:
        """Return the text with tokens such as <EMAIL> in place of personal data."""
        return text

    def words(self, words: Sequence[str]) -> list[str]:
        """Return as many words, each with tokens in place of personal data."""
        return list(words)
