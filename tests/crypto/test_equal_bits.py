"""Every agent ends with the same bits: whatever its processor, its modes and the memory it has.

An agent opens a sum and applies it (`open_sum`, `fedloom.strategies`). Between two agents may
differ: whether the processor flushes subnormal numbers (a library compiled for speed switches it on
for everyone), which vector instructions numpy takes, how many threads there are, where arrays lie,
and whether they are handled whole.
"""

import ctypes
import hashlib
import io
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crypto import Correction, Mask, RunKey, UpdateContext, masked, plain
from fedloom.strategies import ServerState, federated_averaging

KEY = RunKey(bytes(range(32)))
P = 20_000
SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal

# Where the C library keeps the mode in its fenv_t, and the bits that flush results and operands.
MODES = {
    ("Linux", "x86_64"): (28, {"results": 0x8000, "operands": 0x40, "both": 0x8040}),  # MXCSR
    ("Linux", "aarch64"): (0, {"both": 1 << 24}),  # FPCR.FZ
}
OFFSET, FLUSHING = MODES.get((platform.system(), platform.machine()), (0, {}))
MODE_NAMES = ("results", "operands", "both")


@contextmanager
def flushing(mode: str) -> Iterator[None]:
    """Let this thread's processor flush subnormal numbers; skip where that cannot be set."""
    if mode not in FLUSHING:
        pytest.skip(f"no way is known to flush {mode} on {platform.platform()}")
    library = ctypes.CDLL(None)
    environment = ctypes.create_string_buffer(256)
    library.fegetenv(environment)
    before = bytes(environment)
    word = int.from_bytes(before[OFFSET : OFFSET + 4], "little") | FLUSHING[mode]
    environment[OFFSET : OFFSET + 4] = word.to_bytes(4, "little")
    try:
        library.fesetenv(environment)
        yield
    finally:
        library.fesetenv(ctypes.create_string_buffer(before, 256))


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_the_modes_are_really_set(mode):
    tiny = np.full(64, SMALLEST_NORMAL, np.float32)
    subnormal = tiny / np.float32(2)
    with flushing(mode):
        halved, doubled = tiny * np.float32(0.5), subnormal * np.float32(2)
    assert bool(halved.any()) == (mode == "operands")
    assert bool(doubled.any()) == (mode == "results")
    assert (tiny * np.float32(0.5)).all()


# near the smallest normal number (below 2^-87), where flushing shows, and ordinary ones
_near = st.tuples(st.integers(0, 40 << 23), st.booleans()).map(lambda v: v[0] | v[1] << 31)
_far = st.tuples(st.integers(0, 214 << 23), st.booleans()).map(lambda v: v[0] | v[1] << 31)
_bits = hnp.arrays(np.uint32, 16, elements=st.one_of(_near, _near, _far))
_rates = st.one_of(
    st.sampled_from([1.0, 0.5, 0.999999940395355, 1e-3, 2.0**-20, 1e-38, 1e-45, 0.0]),
    st.floats(0.0, 1.0, width=32),
)


def applied(theta: np.ndarray, updates: list[np.ndarray], rate: float) -> bytes:
    rule = federated_averaging(rate)
    state = rule.init(theta)
    for update in updates:
        state = rule.apply(state, update.copy())
    return state.theta.tobytes()


@pytest.mark.parametrize("mode", MODE_NAMES)
@settings(deadline=None)
@given(theta=_bits, updates=st.lists(_bits, min_size=1, max_size=3), rate=_rates)
@example(  # the product lies below the smallest normal number and rounds up to it
    theta=np.zeros(1, np.uint32), updates=[np.full(1, 1 << 23, np.uint32)], rate=1 - 2.0**-24
)
def test_a_step_does_not_depend_on_flushing(mode, theta, updates, rate):
    theta, updates = theta.view(np.float32), [update.view(np.float32) for update in updates]
    expected = applied(theta, updates, rate)
    with flushing(mode):
        found = applied(theta, updates, rate)
    assert found == expected


@given(theta=_bits, updates=st.lists(_bits, min_size=1, max_size=2), rate=_rates)
def test_a_step_leaves_no_number_that_could_be_flushed(theta, updates, rate):
    updates = [update.view(np.float32) for update in updates]
    found = np.frombuffer(applied(theta.view(np.float32), updates, rate), np.uint32)
    assert not ((found & 0x7FFFFFFF) < SMALLEST_NORMAL.view(np.uint32))[found != 0].any()


# sums


def context_of(seed: int, cohort: bytes, clip: float) -> UpdateContext:
    weight_cap = (1, 100, 1 << 20)[seed % 3]
    bits = (16, 8)[seed % 2]
    return UpdateContext(bytes(range(16)), seed, 1, P, 4, weight_cap, clip, bits, cohort)


def sum_of(seed: int, protection: str, clip: float) -> tuple[UpdateContext, bytes]:
    """Return a sum of two updates; what a coordinator does is done once, for all agents."""
    rng = np.random.default_rng(seed)
    context = context_of(seed, bytes(32) if protection == "masked" else b"", clip)
    module, key = (plain, None) if protection == "plain" else (masked, KEY)
    total, masks = module.accumulator(context), None
    for member in range(2):
        update = (rng.standard_normal(P) * clip / 3).astype(np.float32)
        update[: P // 4] *= np.float32(2.0**-100)  # in `plain`, with a small clip: subnormal
        masks = None if key is None else [Mask(bytes([member]) * 32)]
        encoder = module.encoder(context, member, key, rng, masks)
        total.add(member, io.BytesIO(b"".join(encoder.encode(update, 1))))
    left = None if key is None else Correction((Mask(bytes(32)), Mask(b"\1" * 32)))
    return context, b"".join(total.result(left))


def opened(context: UpdateContext, encoded: bytes) -> np.ndarray:
    source = io.BytesIO(encoded)
    if context.cohort:
        return masked.open_sum(context, KEY, (0, 1), source).mean
    return plain.open_sum(context, None, (0, 1), source).mean


def agents_theta(seed: int, sums: list[tuple[UpdateContext, bytes]]) -> bytes:
    """Apply sums as an agent does."""
    theta = np.random.default_rng(seed).normal(0, 0.1, P).astype(np.float32)
    theta[::7] = 0
    return applied(theta, [opened(*summed) for summed in sums], 0.3)


CASES = [(0, "plain", 1e-8), (1, "plain", 0.5), (2, "masked", 0.5), (3, "masked", 1e-19)]


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_opened_and_applied_sums_do_not_depend_on_flushing(mode, case):
    sums = [sum_of(*case)]
    expected, mean = agents_theta(0, sums), opened(*sums[0]).tobytes()
    with flushing(mode):
        assert opened(*sums[0]).tobytes() == mean
        assert agents_theta(0, sums) == expected


def test_the_cases_have_numbers_that_could_be_flushed():
    """Else the tests above could not fail."""
    smallest = [np.abs(opened(*sum_of(*case))) for case in CASES]
    assert any(((mean > 0) & (mean < SMALLEST_NORMAL)).any() for mean in smallest)


PROGRAM = """
import hashlib, sys
from tests.crypto import test_equal_bits as here
digest = hashlib.sha256()
for seed, *case in here.CASES:
    digest.update(here.agents_theta(seed, [here.sum_of(seed, *case)]))
print(digest.hexdigest())
"""


def dispatched() -> list[str]:
    """Return the sets of vector instructions that numpy takes here beyond its least."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return [name for name in __cpu_dispatch__ if __cpu_features__[name]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched()[-1:])},
        {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched())},
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "7"},
        {"PYTHONMALLOC": "malloc", "MALLOC_PERTURB_": "85"},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()) or "as is",
)
def test_another_process_on_other_instructions_ends_with_the_same_bits(changes):
    expected = hashlib.sha256()
    for seed, *case in CASES:
        expected.update(agents_theta(seed, [sum_of(seed, *case)]))
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": path} | changes,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected.hexdigest()]


# places and pieces


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 8, 15])
def test_where_arrays_lie_does_not_show(start):
    context, encoded = sum_of(*CASES[0])
    mean = opened(context, encoded)
    theta = np.random.default_rng(0).normal(0, 0.1, P).astype(np.float32)
    rule = federated_averaging(0.3)
    expected = rule.apply(ServerState(theta), mean.copy()).theta.tobytes()
    moved_theta, moved_mean = np.empty(P + 16, np.float32), np.empty(P + 31, np.float32)
    moved_theta[start : start + P] = theta
    moved_mean[15 - start : 15 - start + P] = mean
    state = ServerState(moved_theta[start : start + P])
    found = rule.apply(state, moved_mean[15 - start : 15 - start + P]).theta
    assert found.tobytes() == expected
    assert found.base is moved_mean  # its memory was handed over


@pytest.mark.parametrize("size", [1, 7, 4096, 16_384, 19_999])
def test_pieces_make_the_same_whole(size):
    context, encoded = sum_of(*CASES[0])
    mean = opened(context, encoded)[: min(P, 200 * size)]
    theta = np.random.default_rng(0).normal(0, 0.1, len(mean)).astype(np.float32)
    rule = federated_averaging(0.3)
    whole = rule.apply(ServerState(theta), mean.copy()).theta
    pieces = [
        rule.apply(ServerState(theta[i : i + size]), mean[i : i + size].copy()).theta
        for i in range(0, len(mean), size)
    ]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
