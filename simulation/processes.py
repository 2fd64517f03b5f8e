"""Clients trained in several processes, each with a mover of its own.

    this process                               worker w of n
    state of the round ── shared memory ─────▶ (read only)
    group g, g mod n = w ── socket, JSON ────▶ train
    sums, in order of g ◀── shared memory ──── updates, memories; what they are: socket, JSON

A worker has two groups at most, so that it trains while the one before is added. Workers are
forked: they share the data and the model that are here, and nothing is copied or serialised. Which
worker trains a group changes nothing: a mover begins anew with each.
"""

import json
import mmap
import os
import signal
import socket
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.local_rules import remembered
from fedloom.errors import ConfigError, FedloomError, Reason, Refused
from fedloom.strategies import RULES, Layout, ServerState, update_length
from fedloom.strategies.rule import length
from fedloom.terms import LocalTraining
from fedloom.v1 import control_pb2
from simulation.movers import Mover, Outcome, Task, Trained, train

MAX_WORKERS = 256
_DEPTH = 2  # groups that a worker has at a time
_LENGTH = struct.Struct("<I")  # before each message
_BEGIN, _TRAIN = b"B", b"T"
Vectors = NDArray[np.float32]


class WorkerLost(FedloomError):
    """A worker process ended before its work was done: killed, or out of memory."""


class Processes:
    """See Crew; `make` makes a worker's mover, in the worker."""

    def __init__(
        self,
        make: Callable[[], Mover],
        group: int,
        workers: int,
        terms: LocalTraining,
        parameter_count: int,
        layout: Layout = (),
    ) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("workers", "expected 1: this system cannot fork processes")
        self._group = group
        self._state = _shared((1 + len(RULES[terms.strategy].keeps), parameter_count))
        sent, kept = _longest(terms, parameter_count, layout), remembered(terms)
        row = sent + kept * parameter_count
        self._desks = [
            _Desk(_shared((_DEPTH, group, row)), sent, (kept, parameter_count))
            for _ in range(workers)
        ]
        self._lines: list[_Line] = []
        self._workers: list[int] = []  # process ids
        for desk in self._desks:
            self._start(make, desk)

    def _start(self, make: Callable[[], Mover], desk: "_Desk") -> None:
        ours, theirs = socket.socketpair()
        process = os.fork()
        if process:
            theirs.close()
            self._lines.append(_Line(ours))
            self._workers.append(process)
            return
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's signals are the caller's
            for line in (*self._lines, _Line(ours)):
                line.close()  # or no socket would end with the caller
            _work(make, _Line(theirs), self._state, desk)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    @property
    def group(self) -> int:
        """See Crew."""
        return self._group

    def begin(self, state: ServerState, terms: LocalTraining) -> None:
        """See Crew."""
        for row, vector in zip(self._state, (state.theta, *state.vectors), strict=True):
            row[:] = vector
        message = state.rounds.to_bytes(8, "little") + terms.to_message().SerializeToString()
        for worker in range(len(self._lines)):
            self._tell(worker, _BEGIN + message)

    def trained(self, groups: Iterator[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """See Crew."""
        under_way: deque[int] = deque()
        for number, tasks in enumerate(groups):
            if len(under_way) == _DEPTH * len(self._lines):
                yield self._received(under_way.popleft())
            self._ask(number, tasks)
            under_way.append(number)
        while under_way:
            yield self._received(under_way.popleft())

    def _place(self, number: int) -> tuple[int, int]:
        """Return the worker of a group, and where on its desk the group lies."""
        turn, worker = divmod(number, len(self._lines))
        return worker, turn % _DEPTH

    def _ask(self, number: int, tasks: Sequence[Task]) -> None:
        worker, place = self._place(number)
        desk = self._desks[worker]
        for index, task in enumerate(tasks):
            desk.memory(place, index)[:] = np.reshape(task.memory, desk.memory_shape)
        said = {"place": place, "tasks": [[task.client, task.order_seed] for task in tasks]}
        self._tell(worker, _TRAIN + json.dumps(said).encode())

    def _received(self, number: int) -> list[Outcome]:
        worker, place = self._place(number)
        message = self._lines[worker].receive()
        if message is None:
            raise self._lost(worker)
        said = json.loads(message)
        if "problem" in said:
            raise ConfigError(said["where"], said["problem"])
        desk = self._desks[worker]
        return [desk.outcome(place, index, one) for index, one in enumerate(said["outcomes"])]

    def _tell(self, worker: int, message: bytes) -> None:
        try:
            self._lines[worker].send(message)
        except OSError as error:
            raise self._lost(worker) from error

    def _lost(self, worker: int) -> WorkerLost:
        return WorkerLost(f"expected worker {worker} to go on, found that it has ended")

    def close(self) -> None:
        """See Crew: what a worker is at is not wanted any more."""
        for line in self._lines:
            line.close()
        for process in self._workers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._lines, self._workers = [], []


class _Line:
    """Messages over a stream socket, each after its length."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._incoming = end.makefile("rb")

    def send(self, message: bytes) -> None:
        self._end.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes | None:
        """Return the next message; None when the other side is gone."""
        try:
            head = self._incoming.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            message = self._incoming.read(length)
        except OSError:
            return None
        return message if len(message) == length else None

    def close(self) -> None:
        self._incoming.close()
        self._end.close()


class _Desk:
    """Where a worker and this process hand vectors over: (places, group, U + M P) float32.

    U is the longest update of any round.
    """

    def __init__(self, rows: Vectors, length: int, memory_shape: tuple[int, int]) -> None:
        self._rows = rows
        self._length = length
        self.memory_shape = memory_shape

    def memory(self, place: int, index: int) -> Vectors:
        """Return where a client's memory lies, (M, P): before the training and after it."""
        return self._rows[place, index, self._length :].reshape(self.memory_shape)

    def put(self, place: int, index: int, outcome: Outcome) -> list[Any]:
        """Lay down what came of a client and return the rest of it."""
        if isinstance(outcome, Refused):
            return [int(outcome.reason), outcome.subject]
        self._rows[place, index, : len(outcome.values)] = outcome.values
        self.memory(place, index)[:] = np.reshape(outcome.memory, self.memory_shape)
        values = len(outcome.values)
        return [values, outcome.weight, outcome.samples, outcome.mean_loss.hex()]

    def outcome(self, place: int, index: int, rest: list[Any]) -> Outcome:
        """Take up what `put` laid down."""
        if len(rest) == 2:
            return Refused(Reason(rest[0]), rest[1])
        length, weight, samples, loss = rest
        values = self._rows[place, index, :length]
        memory = tuple(self.memory(place, index))
        return Trained(values, weight, memory, samples, float.fromhex(loss))


def _longest(terms: LocalTraining, parameter_count: int, layout: Layout) -> int:
    """Return how many values an update has at most: rounds may take turns."""
    if not layout:  # then all of theta is sent, whatever it is
        return length(RULES[terms.strategy].sends, parameter_count)
    return max(update_length(terms, layout, rounds) for rounds in (0, 1))


def _shared(shape: tuple[int, ...]) -> Vectors:
    """Return zeros that this process shares with those that it forks."""
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(4, 4 * size)), np.float32, size).reshape(shape)


def _work(make: Callable[[], Mover], line: _Line, vectors: Vectors, desk: _Desk) -> None:
    """Train what the line asks for, until it ends."""
    mover, state, terms = make(), ServerState(vectors[0]), LocalTraining()
    while (message := line.receive()) is not None:
        kind, content = message[:1], message[1:]
        if kind == _BEGIN:
            rounds = int.from_bytes(content[:8], "little")
            state = ServerState(vectors[0], rounds, tuple(vectors[1:]))
            terms = LocalTraining.from_message(control_pb2.LocalTraining.FromString(content[8:]))
        else:
            line.send(json.dumps(_answer(mover, state, terms, json.loads(content), desk)).encode())


def _answer(
    mover: Mover, state: ServerState, terms: LocalTraining, said: dict[str, Any], desk: _Desk
) -> dict[str, Any]:
    place = said["place"]
    tasks = [
        Task(client, seed, tuple(desk.memory(place, index).copy()))
        for index, (client, seed) in enumerate(said["tasks"])
    ]
    try:
        outcomes = train(mover, tasks, state, terms)
    except ConfigError as error:
        return {"where": error.where, "problem": error.problem}
    return {"outcomes": [desk.put(place, i, outcome) for i, outcome in enumerate(outcomes)]}
