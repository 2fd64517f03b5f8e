"""What happened to an open run since its last finished round, written before it is acted upon.

A coordinator that is started again replays the entries through the same state machines, which do no
I/O, and is where it was. An event is the name of its class and its fields in JSON.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import msgspec

from coordinator.events import Event, KeyShared
from coordinator.run_state import RunState
from coordinator.store import JournalEntry, Store


@dataclass(frozen=True)
class MaskMessage:
    """A member's message in its cohort's protocol for masks, which was followed."""

    agent: str
    message: bytes


Happened = RunState | Event | MaskMessage
_KINDS: dict[str, type[Happened]] = {
    kind.__name__: kind for kind in (*get_args(Event), RunState, MaskMessage)
}


class Journal:
    """The journal of one run."""

    def __init__(self, store: Store, run_id: bytes) -> None:
        self._store = store
        self._run_id = run_id

    def append(self, at: float, happened: Event | MaskMessage) -> None:
        """Remember what happened; `at` in seconds since 1970."""
        self._store.append_journal(self._run_id, _entry(at, happened))

    def restart(self, at: float, state: RunState) -> None:
        """Begin anew from a state: what led to it is needed no more."""
        self._store.restart_journal(self._run_id, _entry(at, state))

    def clear(self) -> None:
        """Forget a run that is over."""
        self._store.restart_journal(self._run_id, None)

    def read(self) -> Iterator[tuple[float, Happened]]:
        """Return what happened, in order."""
        for entry in self._store.journal(self._run_id):
            yield entry.at, msgspec.json.decode(entry.body, type=_KINDS[entry.kind])


def _entry(at: float, happened: Happened) -> JournalEntry:
    if isinstance(happened, KeyShared):  # the envelopes have a table of their own
        happened = replace(happened, envelopes=dict.fromkeys(happened.envelopes, b""))
    return JournalEntry(at, type(happened).__name__, msgspec.json.encode(happened))
