"""Notes that a device keeps for itself, and how one is found: TF-IDF in numpy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[a-z0-9']+")


@dataclass(frozen=True)
class Note:
    """One line that somebody of the house wrote down, and the intent that it belongs to."""

    label: str
    text: str


class Notes:
    """Notes in memory, as unit vectors (N, W) of inverse document frequencies."""

    def __init__(self, notes: Sequence[Note]) -> None:
        self._notes = tuple(notes)
        words = sorted({word for note in notes for word in _words(note.text)})
        self._places = {word: place for place, word in enumerate(words)}
        there = np.array([self._counts(note.text) > 0 for note in notes])  # (N, W)
        self._rarity = np.log((1 + len(notes)) / (1 + there.sum(0))) + 1
        self._vectors = np.array([self._vector(note.text) for note in notes])

    def best(self, text: str, label: str) -> Note:
        """Return the nearest note; one of the intent goes before all others, then the first."""
        scores = self._vectors @ self._vector(text)  # (N,) cosines, 0..1
        same = np.array([note.label == label for note in self._notes])
        return self._notes[int(np.argmax(scores + 2 * same))]

    def _vector(self, text: str) -> NDArray[np.float64]:
        weighed = self._counts(text) * self._rarity
        length = float(np.linalg.norm(weighed))
        return weighed / length if length else weighed

    def _counts(self, text: str) -> NDArray[np.float64]:
        counts = np.zeros(len(self._places))
        for word in _words(text):
            if word in self._places:
                counts[self._places[word]] += 1
        return counts


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
