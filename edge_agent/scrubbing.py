"""Replace personal data in texts before they are tokenised: <EMAIL> for an address, and the like.

It finds what has a form: addresses, telephone numbers that exist, card and bank account numbers
whose check digits are right; and names of persons with a model that tags them. It makes leaks
rarer; what has none of these forms stays.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from itertools import accumulate
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.plans import ADAPTER_FILE, PLAN_FILE

_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[\w-]+(?:\.[\w-]+)+")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,}(?![\w-])")
_CARD_DIGITS = range(12, 20)
_IBAN_START = re.compile(r"(?<!\w)(?=[A-Za-z]{2}\d{2})")
_IBAN = re.compile(r"[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){10,30}(?!\w)")
_GROUP = re.compile(r"[A-Za-z0-9]+")
_DIGITS = re.compile(r"(?:\d\W{0,3}){7}")  # fewer make no telephone number
_LIBRARIES = ("phonenumberslite", "phonenumbers", "python-stdnum")
_INSTALL = 'needs: pip install "fedloom[scrub]"'

Span = tuple[int, int]  # start and end in the text
Finder = Callable[[str], Iterator[Span]]


class Kind(StrEnum):
    """A kind of personal data; the first one in this order wins where two overlap."""

    EMAIL = "email"
    IBAN = "iban"
    CARD = "card"
    PHONE = "phone"
    NAMES = "names"

    @property
    def token(self) -> str:
        """What stands in its place."""
        return "<NAME>" if self is Kind.NAMES else f"<{self.name}>"


@dataclass(frozen=True)
class Scrub:
    """What is replaced.

    `phone_region` is where numbers without a country's code belong, such as `DE`; None: they stay.
    `names_model` is a folder of an exported model that tags names of persons.
    """

    kinds: tuple[Kind, ...] = ()
    phone_region: str | None = None
    names_model: Path | None = None

    @property
    def version(self) -> list[object]:
        """What its outcome depends on besides: the libraries' versions, the model's files."""
        if not self.kinds:
            return []
        files = (
            [self.names_model / name for name in (PLAN_FILE, ADAPTER_FILE)]
            if (self.names_model)
            else []
        )
        states = [path.stat() for path in files if path.is_file()]
        return [
            *(_version(name) for name in _LIBRARIES),
            *((state.st_size, state.st_mtime_ns) for state in states),
        ]


NO_SCRUB = Scrub()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""  # also of phonenumbers, the same library with more in it


class Scrubber:
    """Replaces personal data, counting replacements by kind in `counts`."""

    def __init__(self, scrub: Scrub, counts: Counter[str]) -> None:
        """Load what finds each kind; raises ConfigError when a library or model is missing."""
        self._counts = counts
        self._finders = [(kind, _finder(kind, scrub)) for kind in Kind if kind in scrub.kinds]

    def text(self, text: str) -> str:
        """Return the text with tokens in place of personal data."""
        pieces, position = [], 0
        for start, end, kind in self._found(text):
            pieces += [text[position:start], kind.token]
            position = end
        return "".join([*pieces, text[position:]])

    def words(self, words: Sequence[str]) -> list[str]:
        """Return as many words; each that has a part in personal data has a token there."""
        starts = [0, *accumulate(len(word) + 1 for word in words)]
        scrubbed = list(words)
        # From the end: places before a replacement stay what they were.
        for start, end, kind in reversed(self._found(" ".join(words))):
            for i in range(bisect_right(starts, start) - 1, bisect_left(starts, end)):
                first, last = max(start - starts[i], 0), min(end - starts[i], len(words[i]))
                if first < last:
                    scrubbed[i] = scrubbed[i][:first] + kind.token + scrubbed[i][last:]
        return scrubbed

    def _found(self, text: str) -> list[tuple[int, int, Kind]]:
        """Return what there is, in order, without overlaps, and count it."""
        found: list[tuple[int, int, Kind]] = []
        for kind, finder in self._finders:
            spans = [(start, end, kind) for start, end in finder(text)]
            found += [
                span for span in spans if all(span[1] <= f[0] or f[1] <= span[0] for f in found)
            ]
        self._counts.update(kind.value for _, _, kind in found)
        return sorted(found)


def _finder(kind: Kind, scrub: Scrub) -> Finder:
    match kind:
        case Kind.EMAIL:
            return lambda text: (match.span() for match in _EMAIL.finditer(text))
        case Kind.IBAN:
            return _ibans()
        case Kind.CARD:
            return _cards()
        case Kind.PHONE:
            return _phones(scrub.phone_region)
        case Kind.NAMES:
            return _names(scrub.names_model)


def _names(model: Path | None) -> Finder:
    if model is None:
        raise ConfigError(
            "privacy.scrub",
            "names needs privacy.names_model, a folder of an exported model that tags persons: "
            "no form tells a name, and nothing is fetched from a network",
        )
    from edge_agent.name_finding import NameFinder  # brings ONNX Runtime and the tokenizer

    return NameFinder(model).find


def _ibans() -> Finder:
    try:
        from stdnum import iban
    except ImportError as error:
        raise ConfigError("privacy.scrub", f"iban {_INSTALL}") from error

    def find(text: str) -> Iterator[Span]:
        for start in _IBAN_START.finditer(text):
            match = _IBAN.match(text, start.start())
            # Words may follow that the pattern took for groups of the number.
            for group in reversed(_groups(match)) if match else ():
                if iban.is_valid(text[start.start() : group[1]]):
                    yield start.start(), group[1]
                    break

    return find


def _cards() -> Finder:
    try:
        from stdnum import luhn
    except ImportError as error:
        raise ConfigError("privacy.scrub", f"card {_INSTALL}") from error

    def find(text: str) -> Iterator[Span]:
        for match in _CARD.finditer(text):
            groups, first = _groups(match), 0
            while first < len(groups):
                last = _card_at(text, groups, first, luhn.is_valid)
                if last is not None:
                    yield groups[first][0], groups[last][1]
                first = first + 1 if last is None else last + 1

    return find


def _card_at(
    text: str, groups: Sequence[Span], first: int, valid: Callable[[str], bool]
) -> int | None:
    """Return the last group of a card's number that begins with a group; None for no number."""
    number, found = "", None
    for index, (start, end) in enumerate(groups[first:], start=first):
        number += text[start:end]
        if len(number) >= _CARD_DIGITS.stop:
            break
        if len(number) in _CARD_DIGITS and valid(number):
            found = index
    return found


def _groups(match: re.Match[str]) -> list[Span]:
    """Return where the parts between blanks and dashes lie in the text."""
    start = match.start()
    return [(start + group.start(), start + group.end()) for group in _GROUP.finditer(match[0])]


def _phones(region: str | None) -> Finder:
    try:
        import phonenumbers
    except ImportError as error:
        raise ConfigError("privacy.scrub", f"phone {_INSTALL}") from error
    if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
        raise ConfigError("privacy.phone_region", f"expected one such as DE, found {region!r}")

    def find(text: str) -> Iterator[Span]:
        if _DIGITS.search(text):  # the matcher is slow
            for match in phonenumbers.PhoneNumberMatcher(text, region):
                yield match.start, match.end

    return find
