"""The example's texts: the operator's public ones, and each device's own rows and notes.

Sentences and intents are those of examples/home_assistant. A note is a frame of its intent with a
room and a hint; a reply is what the house's assistant does, and the note. No device's note is in
the public text, though its words are.
"""

import csv
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path

from examples.assistant.notes import Note, Notes

Row = tuple[str, str]  # (text, label)
COLUMNS = ("text", "label", "note", "reply")
PROMPT = "Q: {text}\nNote: {note}\nA:"
ANSWER = " {reply}"
NOTES_PER_LABEL = 4
_TEMPLATES = Path(__file__).parents[1] / "home_assistant" / "templates.toml"
_NEUTRAL = "Okay"  # of the public text: what to say instead is the adapter's to learn
# What a house's assistant says, and what its notes are about.
_HOUSE = {
    "add_shopping_item": ("It is on the list", "the shopping basket is"),
    "call_contact": ("Calling now", "the phone is"),
    "create_reminder": ("I will remind you", "the calendar hangs"),
    "dim_lights": ("Dimming the lights", "the dimmer is"),
    "lights_off": ("Lights off", "the main switch is"),
    "lights_on": ("Lights on", "the spare bulb is"),
    "lock_door": ("Locking the door", "the spare key is"),
    "news_briefing": ("Here is the news", "the radio stands"),
    "open_blinds": ("Opening the blinds", "the crank is"),
    "play_music": ("Playing music", "the speaker stands"),
    "set_alarm": ("The alarm is set", "the alarm clock is"),
    "set_temperature": ("Setting the heating", "the reset button is"),
    "set_timer": ("The timer runs", "the egg timer is"),
    "start_vacuum": ("The vacuum starts", "the dust bin is"),
    "stop_music": ("Music off", "the mute button is"),
    "weather_forecast": ("Looking at the sky", "the umbrella is"),
}
_PLACES = ("behind", "under", "beside", "above", "inside", "near")
_THINGS = (
    *("shelf", "door", "window", "cupboard", "stairs", "table", "lamp", "boiler", "mirror"),
    *("sofa", "drawer", "curtain", "piano", "plant", "chair", "box"),
)
LABELS = tuple(_HOUSE)


def device_notes(number: int) -> list[Note]:
    """Return the notes of a device."""
    draw = random.Random(f"device {number}")
    return [_note(label, draw, odd=True) for label in LABELS for _ in range(NOTES_PER_LABEL)]


def reply(label: str, note: str) -> str:
    """Return what the house's assistant says."""
    return f"{_HOUSE[label][0]}. {note}"


def public_texts(rows: Sequence[Row], seed: int = 0, copies: int = 4) -> list[tuple[str, str]]:
    """Return (prompt, answer) of the operator's own text: a neutral reply to any note."""
    draw = random.Random(seed)
    made = []
    for text, label in list(rows) * copies:
        note = _note(draw.choice((label, *LABELS)), draw, odd=False).text
        made.append((PROMPT.format(text=text, note=note), f" {_NEUTRAL}. {note}"))
    draw.shuffle(made)
    return made


def sayings() -> list[str]:
    """Return every sentence that an assistant begins with, for the tokenizer."""
    return [said for said, _ in _HOUSE.values()]


def write_rows(rows: Sequence[Row], notes: Sequence[Note], path: Path) -> None:
    """Write a device's rows, each with the note that retrieval finds and the reply to learn."""
    found = Notes(notes)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for text, label in rows:
            note = found.best(text, label).text
            writer.writerow((text, label, note, reply(label, note)))


def write_notes(notes: Sequence[Note], path: Path) -> None:
    """Write a device's notes."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("label", "note"))
        writer.writerows((note.label, note.text) for note in notes)


def read_notes(path: Path) -> list[Note]:
    """Read a device's notes."""
    with path.open(newline="") as file:
        return [Note(row["label"], row["note"]) for row in csv.DictReader(file)]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read rows with the columns COLUMNS, or some of them."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _note(label: str, draw: random.Random, *, odd: bool) -> Note:
    """Draw a note; devices have the odd combinations of place, thing and room, the public even."""
    rooms = tomllib.loads(_TEMPLATES.read_text())["slots"]["room"]
    while True:
        chosen = [draw.randrange(len(words)) for words in (_PLACES, _THINGS, rooms)]
        if sum(chosen) % 2 == odd:
            break
    place, thing, room = chosen
    what = _HOUSE[label][1]
    text = f"{what} {_PLACES[place]} the {_THINGS[thing]} in the {rooms[room]}."
    return Note(label, text[0].upper() + text[1:])
