"""Write the training sentences of the home-assistant example.

Each intent in templates.toml has sentence frames with slots. A frame that is a bare imperative
("turn on the {light}") goes into a wrapper ("could you {x}?"); a frame that is a whole sentence
may get an opener ("um, "). A small share of the sentences then gets casual spellings, a typo,
lower case without a full stop, or capitals, as people type and as speech recognisers print.

The same seed, templates and counts give the same file, byte for byte:

    python examples/home_assistant/generate.py --out examples/home_assistant/train.csv
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MIN_WORDS, MAX_WORDS = 2, 15
MAX_ATTEMPTS = 100_000
SLOT = re.compile(r"\{(\w+)\}")

OPENER_SHARE = 0.12
CASUAL_SHARE = 0.12
TYPO_SHARE = 0.05
LOWER_SHARE, EXCLAIM_SHARE, UPPER_SHARE = 0.30, 0.04, 0.01

Templates = dict[str, Any]


def fill(frame: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """Replace every slot, and the slots inside its value; one slot used twice gets two values."""
    used: dict[str, list[str]] = {}

    def pick(match: re.Match[str]) -> str:
        name = match[1]
        taken = used.setdefault(name, [])
        value = rng.choice([value for value in slots[name] if value not in taken])
        taken.append(value)
        return fill(value, slots, rng)

    return SLOT.sub(pick, frame)


def casual(text: str, spellings: dict[str, str]) -> str:
    """Use the casual spelling of every word that has one."""
    for plain, sloppy in spellings.items():
        text = re.sub(rf"\b{re.escape(plain)}\b", sloppy, text)
    return text


def typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap a letter inside one longer lower-case word."""
    words = list(re.finditer(r"\b[a-z]{5,}\b", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 2)
    first, second = text[at], text[at + 1]
    changed = rng.choice([second, first + first + second, second + first])
    return text[:at] + changed + text[at + 2 :]


def finish(text: str, rng: random.Random) -> str:
    """Set the case and the punctuation at the end."""
    draw = rng.random()
    if draw < LOWER_SHARE:
        return text.lower().rstrip(".?")
    if draw < LOWER_SHARE + UPPER_SHARE:
        return text.upper()
    if draw < LOWER_SHARE + UPPER_SHARE + EXCLAIM_SHARE and text.endswith("."):
        text = text[:-1] + "!"
    return text[0].upper() + text[1:]


def sentence(frame: str, templates: Templates, rng: random.Random) -> str:
    """Turn one frame, already in its wrapper or opener, into a sentence."""
    text = fill(frame, templates["slots"], rng)
    if rng.random() < CASUAL_SHARE:
        text = casual(text, templates["casual"])
    if rng.random() < TYPO_SHARE:
        text = typo(text, rng)
    return finish(text, rng)


def frames(intent: dict[str, list[str]], templates: Templates, rng: random.Random) -> Iterator[str]:
    """Yield the intent's frames without end, each as often as the others, in changing order."""
    pool = [(frame, True) for frame in intent["asks"]]
    pool += [(frame, False) for frame in intent["says"]]
    while True:
        rng.shuffle(pool)
        for frame, is_imperative in pool:
            if is_imperative:
                yield rng.choice(templates["wrappers"]).replace("{x}", frame)
            elif rng.random() < OPENER_SHARE:
                yield rng.choice(templates["openers"]) + frame
            else:
                yield frame


def normalised(text: str) -> str:
    """Reduce a sentence to what makes it a duplicate of another."""
    return " ".join(re.findall(r"[a-z0-9&']+", text.lower()))


def sentences(label: str, templates: Templates, count: int, seed: int) -> list[str]:
    """Return `count` different sentences of one intent; other intents do not change them."""
    rng = random.Random(f"{seed}:{label}")
    found: dict[str, str] = {}
    source = frames(templates["intents"][label], templates, rng)
    for _ in range(MAX_ATTEMPTS):
        text = sentence(next(source), templates, rng)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            found.setdefault(normalised(text), text)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"the templates of {label} give fewer than {count} different sentences")


def corpus(templates: Templates, per_label: int, seed: int) -> list[tuple[str, str]]:
    """Return the shuffled (text, label) rows of all intents."""
    rows = [
        (text, label)
        for label in sorted(templates["intents"])
        for text in sentences(label, templates, per_label, seed)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def main() -> None:
    """Read the templates, write the CSV."""
    parser = argparse.ArgumentParser(description="Write the home-assistant training sentences.")
    parser.add_argument("--out", type=Path, default=Path("train.csv"), help="the CSV to write")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same sentences")
    parser.add_argument("--per-label", type=int, default=113, help="sentences per intent")
    parser.add_argument("--templates", type=Path, default=HERE / "templates.toml")
    args = parser.parse_args()

    templates = tomllib.loads(args.templates.read_text(encoding="utf-8"))
    rows = corpus(templates, args.per_label, args.seed)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
