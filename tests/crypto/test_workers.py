"""Any number of processes gives the same; whatever ends them is said, and none outlives its use."""

import copy
import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import deque
from functools import partial
from itertools import starmap
from operator import itemgetter
from pathlib import Path

import numpy as np
import psutil
import pytest

from crypto import (
    CryptoError,
    InvalidContext,
    MalformedChunk,
    SpoiledTotal,
    TagMismatch,
    WorkerLost,
    errors,
    workers,
)
from crypto.crew import InProcess, count_processes, crew_of, stepped
from crypto.errors import IllegalStep
from crypto.workers import Workers

P = 600_000  # three chunks of values at 16 bits, two at 8
ECHO = partial(map, itemgetter(1))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _alone():
    """Let the workers of totals that earlier tests left behind end first."""
    gc.collect()
    for child in multiprocessing.active_children():
        child.join(5)
    assert not multiprocessing.active_children()


def many(bench, **changes):
    return bench.context(parameter_count=P, **changes)


def encoded(bench, context, member, update, processes):
    rng, masks = np.random.default_rng(member), bench.masks(member)
    protection = bench.protection
    encoder = protection.encoder(context, member, bench.run_key, rng, masks, processes)
    return b"".join(encoder.encode(update, 7))


def opened(bench, context, members, summed, processes):
    source = io.BytesIO(summed)
    return bench.protection.open_sum(context, bench.run_key, members, source, processes)


# the same with any number


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_rounded_does_not_depend_on_the_number_of_processes(bench, random_update, bits):
    context, update = many(bench, update_bits=bits), random_update(P)
    uploads = [encoded(bench, context, 0, update, processes) for processes in (1, 2, 3)]
    if bench.name in ("plain", "masked"):  # nothing else in them is random
        assert len(set(uploads)) == 1
    sums = [bench.summed(bench.total(context, upload)) for upload in uploads]
    means = [bench.open(context, (0,), summed).mean.tobytes() for summed in sums]
    assert len(set(means)) == 1


def test_totals_and_opened_sums_do_not_depend_on_the_number_of_processes(bench, random_update):
    context = many(bench)
    uploads = [encoded(bench, context, i, random_update(P, i), 1) for i in range(3)]
    sums = set()
    for processes in (1, 2, 3):
        total = bench.protection.accumulator(context, processes)
        for member, upload in enumerate(uploads):
            total.add(member, io.BytesIO(upload))
        sums.add(bench.summed(total))
    assert len(sums) == 1
    found = [opened(bench, context, (0, 1, 2), *sums, processes) for processes in (1, 2, 0)]
    assert len({sum_.mean.tobytes() for sum_ in found}) == 1
    assert len({(s.total_weight, s.saturated, s.count, s.exponents) for s in found}) == 1


def test_a_total_in_workers_is_read_twice_and_between_additions(tagging, random_update):
    context = many(tagging)
    uploads = [encoded(tagging, context, i, random_update(P, i), 1) for i in range(2)]
    total = tagging.protection.accumulator(context, 2)
    total.add(0, io.BytesIO(uploads[0]))
    next(total.result(tagging.correction(0)))  # left where it is
    first = tagging.summed(total)
    assert tagging.summed(total) == first
    total.add(1, io.BytesIO(uploads[1]))
    assert tagging.summed(total) == tagging.summed(tagging.total(context, *uploads))


def test_workers_that_import_everything_anew_do_the_same(encrypted, random_update, monkeypatch):
    monkeypatch.setattr(workers, "_METHOD", "spawn")
    context, update = many(encrypted), random_update(P)
    upload = encoded(encrypted, context, 0, update, 2)
    summed = encrypted.summed(encrypted.total(context, upload))
    expected = encrypted.through(context, [update], [7])
    assert opened(encrypted, context, (0,), summed, 2).mean.tobytes() == expected.mean.tobytes()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_results_come_in_the_order_of_the_chunks(processes, count):
    chunks = [(i, os.urandom(i * 7919)) for i in range(count)]
    chunks = chunks[-1:] + chunks[:-1]  # as in a sum: the last one first
    found = list(stepped(ECHO, iter(chunks), processes))
    assert found == [body for _, body in chunks]


def test_a_chunk_always_comes_to_the_same_worker():
    """`enumerate` counts the chunks that one worker has seen."""
    crew = Workers(enumerate, 3)
    first = [(i,) for i in range(6)]
    assert list(crew.run(first)) == list(zip([0, 0, 0, 1, 1, 1], first, strict=True))
    again = first[-1:] + first[:-1]
    assert list(crew.run(again)) == list(zip([2, 2, 2, 3, 3, 3], again, strict=True))
    crew.close()


# errors


@pytest.mark.parametrize("processes", [-1, 257])
def test_an_impossible_number_of_processes_is_refused(encrypted, processes):
    context, rng = encrypted.context(), np.random.default_rng()
    with pytest.raises(InvalidContext, match="processes"):
        encrypted.protection.encoder(context, 0, encrypted.run_key, rng, None, processes)
    with pytest.raises(InvalidContext, match="processes"):
        encrypted.protection.accumulator(context, processes)


def test_no_more_processes_than_chunks_or_cores():
    assert count_processes(8, 3) == 3
    assert count_processes(1, 3) == count_processes(8, 1) == 1
    assert count_processes(0, 1 << 20) == os.cpu_count()
    assert isinstance(crew_of(ECHO, 1), InProcess)


def every_error():
    found, waiting = [], [CryptoError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    assert WorkerLost in found
    assert {kind.__module__ for kind in found} == {errors.__name__}
    return found


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_in_another_process(kind):
    error = kind("subject", (1, b"expected"), 3)
    copied = copy.copy(error)  # as pickling does it
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_step_raises_arrives_after_the_results_before_it(processes):
    chunks = [(1, 1), (2, 1), (3, 0), (4, 1)]
    results = stepped(partial(starmap, divmod), iter(chunks), processes)
    assert [next(results), next(results)] == [(1, 0), (2, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("place", "refusal"), [(0, TagMismatch), (7 * 4096, MalformedChunk)])
def test_a_refusal_by_a_worker_is_that_of_one_process(encrypted, random_update, place, refusal):
    context = many(encrypted)
    upload = encoded(encrypted, context, 0, random_update(P), 1)
    summed = bytearray(encrypted.summed(encrypted.total(context, upload)))
    body = summed.index(b"FDLM", 1) + 52  # of the first chunk of values
    new = bytes(4096) if refusal is TagMismatch else b"\xff" * 14 * 32 * 4096
    summed[body + place : body + place + len(new)] = new
    texts = set()
    for processes in (1, 2):
        with pytest.raises(refusal) as refused:
            opened(encrypted, context, (0,), bytes(summed), processes)
        texts.add(str(refused.value))
        del refused
    assert len(texts) == 1
    assert not multiprocessing.active_children()


def test_only_one_run_at_a_time():
    crew = Workers(ECHO, 2)
    running = crew.run([(i, i) for i in range(9)])
    next(running)
    with pytest.raises(IllegalStep):
        next(crew.run([(0, 0)]))
    assert list(running) == list(range(1, 9))
    assert list(crew.run([(0, 0)])) == [0]
    crew.close()


# a worker ends


def test_a_worker_that_ends_is_said():
    with pytest.raises(WorkerLost, match="exit code 3"):
        list(stepped(partial(starmap, os._exit), iter([(3,)]), 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [EOFError, OSError])
def test_a_worker_that_does_not_start_is_said(monkeypatch, error):
    def start(_):
        raise error("no more processes")

    main = vars(sys.modules["__main__"])
    before = main.get("__file__")  # a test runner's own worker has none
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    with pytest.raises(WorkerLost, match="expected to start, found no more processes"):
        list(stepped(ECHO, iter([(0, 0)]), 2))
    assert main.get("__file__") == before


def test_a_killed_worker_ends_the_encoding(encrypted, random_update):
    rng = np.random.default_rng()
    context, protection = many(encrypted), encrypted.protection
    encoder = protection.encoder(context, 0, encrypted.run_key, rng, None, 2)
    frames = encoder.encode(random_update(P), 1)
    next(frames)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(WorkerLost, match=f"exit code {-signal.SIGKILL}"):
        list(frames)
    assert not multiprocessing.active_children()


def test_a_total_whose_worker_was_killed_is_spoiled(encrypted, random_update):
    context = many(encrypted)
    upload = encoded(encrypted, context, 0, random_update(P), 1)
    total = encrypted.protection.accumulator(context, 2)
    total.add(0, io.BytesIO(upload))
    multiprocessing.active_children()[0].kill()
    other = encoded(encrypted, context, 1, random_update(P), 1)
    with pytest.raises(SpoiledTotal) as spoiled:
        total.add(1, io.BytesIO(other))
    assert isinstance(spoiled.value.__cause__, WorkerLost)
    with pytest.raises(SpoiledTotal):
        total.result()


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 7, 20])
def test_a_worker_killed_at_any_moment_is_never_waited_for(milliseconds):
    """Also in the middle of a result that is larger than a pipe."""
    chunks = ((i, bytes(1 << 20)) for i in range(10_000))
    crew = Workers(ECHO, 2)
    results = crew.run(chunks)
    next(results)
    killing = threading.Timer(milliseconds / 1000, crew._processes[1].kill)
    killing.start()
    with pytest.raises(WorkerLost):
        deque(results, maxlen=0)
    crew.close()
    killing.join()


# nothing is left


def test_nothing_outlives_its_use(encrypted, random_update):
    context = many(encrypted)
    upload = encoded(encrypted, context, 0, random_update(P), 2)  # starts the server of forks
    descriptors = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    total = encrypted.protection.accumulator(context, 2)
    total.add(0, io.BytesIO(upload))
    opened(encrypted, context, (0,), encrypted.summed(total), 2)
    children = multiprocessing.active_children()
    assert len(children) == 2  # those of the total
    del total
    for child in children:
        child.join(5)
        assert child.exitcode == 0
        child.close()
    del children, child
    if descriptors:
        assert psutil.Process().num_fds() == descriptors


PROGRAM = """
import numpy as np, crypto, os
context = crypto.UpdateContext(bytes(16), 0, 0, 100_000_000, 100, 1, 1.0)
encrypted = crypto.protection("encrypted")
key = crypto.RunKey(b"the key of this run, 32 bytes...")
encoder = encrypted.encoder(context, 0, key, np.random.default_rng(), None, 2)
for frame in encoder.encode(np.zeros(100_000_000, np.float32), 1):
    print("frame", flush=True)
"""


@pytest.fixture
def running(tmp_path):
    """Run a program that encodes for a minute: a script without a guard for its main module."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(3):
        assert process.stdout.readline() == "frame\n", process.stderr.read()
    yield psutil.Process(process.pid), process
    process.kill()
    process.communicate()


@LINUX
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_caller_however_it_ends(running, number):
    program, process = running
    family = program.children(recursive=True)
    assert len(family) >= 3  # two workers and the server that forked them
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    _, said = process.communicate()
    assert said.count("Traceback") == (1 if number is signal.SIGINT else 0), said


@LINUX
def test_no_command_line_and_no_environment_shows_the_key(running):
    program, _ = running
    for member in [program, *program.children(recursive=True)]:
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{member.pid}/{name}").read_bytes()
            assert shown
            assert b"the key of this run" not in shown


def test_the_callers_memory_does_not_grow_with_the_update(encrypted):
    peaks = []
    for count in (1_200_000, 4_800_000):
        context, rng = encrypted.context(parameter_count=count), np.random.default_rng()
        encoder = encrypted.protection.encoder(context, 0, encrypted.run_key, rng, None, 2)
        update = np.zeros(count, np.float32)
        tracemalloc.start()
        size = sum(len(chunk) for chunk in encoder.encode(update, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size == encoder.encoded_size
    assert peaks[1] <= peaks[0] + 64 * 1024
    assert peaks[1] < 16 << 20
