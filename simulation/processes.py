"""Clients trained in several processes, each with a mover of its own.

    this process                               worker w of n
    state of the round ── shared memory ─────▶ (read only)
    group g, g mod n = w ── pipe, JSON ──────▶ train
    sums, in order of g ◀── shared memory ──── updates, memories; what they are: pipe, JSON

A worker has two groups at most, so that it trains while the one before is added. Workers are
forked: they share the data and the model that are here, and nothing is copied or serialised. Which
worker trains a group changes nothing: a mover begins anew with each.
"""

import json
import mmap
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import ConfigError, FedloomError, Reason, Refused
from fedloom.strategies import RULES, ServerState, update_length
from fedloom.terms import LocalTraining
from fedloom.v1 import control_pb2
from simulation.movers import Mover, Outcome, Task, Trained, train

MAX_WORKERS = 256
_DEPTH = 2  # groups that a worker has at a time
_SECONDS_TO_END = 5.0
Vectors = NDArray[np.float32]


class WorkerLost(FedloomError):
    """A worker process ended before its work was done."""


class Processes:
    """See Crew; `make` makes a worker's mover, in the worker."""

    def __init__(
        self,
        make: Callable[[], Mover],
        group: int,
        workers: int,
        terms: LocalTraining,
        parameter_count: int,
    ) -> None:
        if "fork" not in get_all_start_methods():
            raise ConfigError("workers", "expected 1: this system cannot fork processes")
        self._group = group
        rule = RULES[terms.strategy]
        self._state = _shared((1 + len(rule.keeps), parameter_count))
        length, remembered = update_length(terms, parameter_count), len(rule.remembers)
        row = length + remembered * parameter_count
        self._desks = [
            _Desk(_shared((_DEPTH, group, row)), length, (remembered, parameter_count))
            for _ in range(workers)
        ]
        self._pipes: list[Connection[bytes, bytes]] = []
        self._processes: list[Any] = []
        context = get_context("fork")
        for desk in self._desks:
            ours, theirs = context.Pipe()
            inherited = [*self._pipes, ours]
            process = context.Process(
                target=_work, args=(make, theirs, inherited, self._state, desk), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def group(self) -> int:
        """See Crew."""
        return self._group

    def begin(self, state: ServerState, terms: LocalTraining) -> None:
        """See Crew."""
        for row, vector in zip(self._state, (state.theta, *state.vectors), strict=True):
            row[:] = vector
        message = state.rounds.to_bytes(8, "little") + terms.to_message().SerializeToString()
        for pipe in self._pipes:
            self._send(pipe, b"B" + message)

    def trained(self, groups: Iterator[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """See Crew."""
        count, under_way = len(self._pipes), deque[int]()
        for number, tasks in enumerate(groups):
            if len(under_way) == _DEPTH * count:
                yield self._received(under_way.popleft())
            self._ask(number, tasks)
            under_way.append(number)
        while under_way:
            yield self._received(under_way.popleft())

    def _ask(self, number: int, tasks: Sequence[Task]) -> None:
        worker, place = number % len(self._pipes), number // len(self._pipes) % _DEPTH
        for index, task in enumerate(tasks):
            self._desks[worker].memory(place, index)[:] = np.reshape(
                task.memory, self._desks[worker].memory_shape
            )
        said = {"place": place, "tasks": [[task.client, task.order_seed] for task in tasks]}
        self._send(self._pipes[worker], b"T" + json.dumps(said).encode())

    def _received(self, number: int) -> list[Outcome]:
        worker, place = number % len(self._pipes), number // len(self._pipes) % _DEPTH
        try:
            said = json.loads(self._pipes[worker].recv_bytes())
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if "problem" in said:
            raise ConfigError(said["where"], said["problem"])
        return [
            self._desks[worker].outcome(place, index, one)
            for index, one in enumerate(said["outcomes"])
        ]

    def _send(self, pipe: "Connection[bytes, bytes]", message: bytes) -> None:
        try:
            pipe.send_bytes(message)
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> WorkerLost:
        for process in self._processes:
            process.join(0.1)
        codes = [process.exitcode for process in self._processes]
        return WorkerLost(f"expected workers to go on, found exit codes {codes}")

    def close(self) -> None:
        """See Crew."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_SECONDS_TO_END)
            if process.exitcode is None:
                process.kill()


class _Desk:
    """Where a worker and this process hand vectors over: (places, group, U + M P) float32."""

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
        self._rows[place, index, : self._length] = outcome.values
        self.memory(place, index)[:] = np.reshape(outcome.memory, self.memory_shape)
        return [outcome.weight, outcome.samples, outcome.mean_loss.hex()]

    def outcome(self, place: int, index: int, rest: list[Any]) -> Outcome:
        """Take up what `put` laid down."""
        if len(rest) == 2:
            return Refused(Reason(rest[0]), rest[1])
        weight, samples, loss = rest
        values = self._rows[place, index, : self._length]
        memory = tuple(self.memory(place, index))
        return Trained(values, weight, memory, samples, float.fromhex(loss))


def _shared(shape: tuple[int, ...]) -> Vectors:
    """Return zeros that this process shares with those that it forks."""
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(4, 4 * size)), np.float32, size).reshape(shape)


def _work(
    make: Callable[[], Mover],
    pipe: "Connection[bytes, bytes]",
    inherited: Sequence["Connection[bytes, bytes]"],
    vectors: Vectors,
    desk: _Desk,
) -> None:
    """Train what the pipe asks for, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's signals are the caller's
    for other in inherited:
        other.close()  # or no pipe would end with the caller
    mover, state, terms = make(), ServerState(vectors[0]), LocalTraining()
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # what was inherited is not ours to tidy up
        if message[:1] == b"B":
            rounds = int.from_bytes(message[1:9], "little")
            state = ServerState(vectors[0], rounds, tuple(vectors[1:]))
            terms = LocalTraining.from_message(control_pb2.LocalTraining.FromString(message[9:]))
            continue
        said = json.loads(message[1:])
        try:
            answer = _answer(mover, state, terms, said, desk)
        except ConfigError as error:
            answer = {"where": error.where, "problem": error.problem}
        pipe.send_bytes(json.dumps(answer).encode())


def _answer(
    mover: Mover, state: ServerState, terms: LocalTraining, said: dict[str, Any], desk: _Desk
) -> dict[str, Any]:
    place = said["place"]
    tasks = [
        Task(client, seed, tuple(desk.memory(place, index).copy()))
        for index, (client, seed) in enumerate(said["tasks"])
    ]
    outcomes = train(mover, tasks, state, terms)
    return {"outcomes": [desk.put(place, i, outcome) for i, outcome in enumerate(outcomes)]}
