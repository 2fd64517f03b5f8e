"""The device's program: text -> intent -> note of this house -> reply, two adapters on one base.

Beside it `fedloom-agent` may go on training and making versions: each question is answered by the
version that is active then, in the sessions that were loaded for the first one.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.generation import LanguageModel, Request, gathered
from edge_agent.identity import load_identity
from edge_agent.inference import Adapter, TextClassifier
from edge_agent.library import Library
from edge_agent.model_versions import ModelVersions
from edge_agent.sampling import Sampling
from examples.assistant.notes import Note, Notes
from examples.assistant.rows import read_notes
from fedloom.plans import BASE_FILE

INTENT, REPLY = "intent", "reply"
_GREEDY = Request(max_tokens=40, sampling=Sampling(temperature=0.0))


@dataclass(frozen=True)
class Answer:
    """What the device says to a text, and what it came from."""

    text: str
    label: str
    probability: float
    note: str
    reply: str
    versions: tuple[int, int]  # of the intent's and the reply's adapter

    def __str__(self) -> str:
        intent, reply = self.versions
        return (
            f"> {self.text}\n"
            f"  intent v{intent}: {self.label} ({self.probability:.0%})\n"
            f"  note: {self.note}\n"
            f"  reply v{reply}: {self.reply}"
        )


class Assistant:
    """Answers with a device's own models and notes."""

    def __init__(self, versions: ModelVersions, notes: Sequence[Note], threads: int = 1) -> None:
        self.versions = versions
        self.library = Library(versions, threads)
        self._notes = Notes(notes)

    def answer(self, text: str) -> Answer:
        """Answer with the versions that are active now."""
        intent, reply = self.library.adapter(INTENT), self.library.adapter(REPLY)
        [found] = classifier(intent).answer(intent.theta, [text])
        note = self._notes.best(text, found.label).text
        return Answer(
            text,
            found.label,
            found.probability,
            note,
            written(reply, text, note),
            (intent.version, reply.version),
        )

    @property
    def base_is_shared(self) -> bool:
        """Whether the base of both adapters is one file on the disk, mapped once."""
        intent, reply = (
            self.versions.path(name, self.library.adapter(name).version) / BASE_FILE
            for name in (INTENT, REPLY)
        )
        return intent.samefile(reply)


def assistant_of(home: Path, notes: Path) -> Assistant:
    """Return the assistant on the models of an agent's folder and a file of notes."""
    key = load_identity(home).identity_key.public_key()
    return Assistant(ModelVersions(home / "models", key), read_notes(notes))


def classifier(adapter: Adapter) -> TextClassifier:
    """Return the model of an adapter that classifies."""
    if not isinstance(adapter.model, TextClassifier):
        raise TypeError(f"expected a classifier, found {type(adapter.model).__name__}")
    return adapter.model


def written(adapter: Adapter, text: str, note: str) -> str:
    """Return the reply of an adapter that writes, its most probable tokens."""
    model = adapter.model
    if not isinstance(model, LanguageModel):
        raise TypeError(f"expected a language model, found {type(model).__name__}")
    prompt = model.prompt({"text": text, "note": note})
    reply, _ = gathered(model.generate(adapter.theta, prompt, _GREEDY))
    return reply.strip()


def main() -> None:
    """Answer every line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder of the agent")
    parser.add_argument("--notes", type=Path, required=True, help="CSV with label and note")
    options = parser.parse_args()
    assistant = assistant_of(options.home, options.notes)
    for line in sys.stdin:
        print(assistant.answer(line.strip()), flush=True)


if __name__ == "__main__":
    main()
