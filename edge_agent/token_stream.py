"""Token ids to text while they come: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"  # what tokenizers make of bytes that are no character yet
_LONGEST_CHARACTER = 4  # bytes of UTF-8: more tokens than that cannot be waiting for its end


class Decoder(Protocol):
    """What turns token ids into text."""

    def decode(self, ids: list[int], /) -> str:
        """Return the text of the ids."""
        ...


class TextStream:
    """Decodes the tokens of one text; the pieces, one after another, are the text.

    A tokenizer may write a token differently at a text's start (a blank that is left out, say), so
    each piece is what some tokens add to the text of the few before them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._before = 0  # where the tokens begin that the next piece is decoded with
        self._told = 0  # where those begin whose text is not whole yet
        self._said = 0  # characters of the text from `_before` on that have been given

    def push(self, token: int) -> str:
        """Take a token; return what can be said now, which may be nothing."""
        self._ids.append(token)
        text = self._decoder.decode(self._ids[self._before :])
        if not text.endswith(_UNFINISHED):
            return self._give_all(text)
        if len(self._ids) - self._told < _LONGEST_CHARACTER:
            return ""
        # Bytes that no further token can mend. Only the last few may still become a character.
        unfinished = min(len(text) - len(text.rstrip(_UNFINISHED)), _LONGEST_CHARACTER - 1)
        piece = text[self._said : len(text) - unfinished]
        self._said += len(piece)
        return piece

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character."""
        return self._give_all(self._decoder.decode(self._ids[self._before :]))

    def _give_all(self, text: str) -> str:
        piece = text[self._said :]
        if piece:
            self._before, self._told = self._told, len(self._ids)
            self._said = len(self._decoder.decode(self._ids[self._before :]))
        return piece


class StopStrings:
    """Cuts a text before the first of some strings; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None  # the string that ended the text

    def push(self, piece: str) -> str:
        """Return what surely belongs to the text; nothing after the end."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if places:
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
