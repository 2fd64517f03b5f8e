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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crypto import Correction, Mask, ProtectionName, RunKey, UpdateContext, protection
from fedloom.plans import TrainableTensor
from fedloom.strategies import ServerState, algorithm, federated_averaging, update_length
from fedloom.strategies.arithmetic import add, divide, flush, multiply, subtract
from fedloom.terms import STRATEGIES_WITH, Strategy
from tests.strategies.samples import ALL_TERMS

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
        state = rule.apply(state, update.copy(), 1)
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


# the operations that every rule is made of


def operated(operation: Callable[[np.ndarray, np.ndarray], None], seed: int) -> bytes:
    """Operate on flushed values, quotients about the smallest normal number among them."""
    random = np.random.default_rng(seed)
    values, others = any_values(random, 4000), any_values(random, 4000)
    near = random.integers(0x00800000, 0x01000000, 4000, np.uint32)
    if operation is divide:
        values[::2], others[::2] = near[::2].view(np.float32), 2
        values[::8] = np.uint32(0x00FFFFFF).view(np.float32)  # rounds up to the smallest normal
    if operation is multiply:
        values[::2], others[::2] = near[::2].view(np.float32), 1 - 2.0**-24
        values[::8] = SMALLEST_NORMAL  # rounds up to itself
    flush(values)
    flush(others)
    others[others == 0] = 1
    operation(values, others)
    return values.tobytes()


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("operation", [add, subtract, multiply, divide])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_operation_does_not_depend_on_flushing(mode, operation, seed):
    with np.errstate(over="ignore"):
        expected = operated(operation, seed)
        with flushing(mode):
            assert operated(operation, seed) == expected


# every rule, and all of its state: later rounds follow from it

RULE_P = 500
_of_rules = st.tuples(
    st.sampled_from(ALL_TERMS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.one_of(_rates, st.sampled_from([8.0, 1e3])),
    st.sampled_from([0.0, 0.5, 0.9, 1e-30]),
)


def any_values(random: np.random.Generator, size: int) -> np.ndarray:
    """Draw about the smallest normal number, not far above it, up to 2^23 and up to 2^87."""
    highest = random.choice(np.array([4, 4, 40, 150, 214], np.uint32), size)
    bits = random.integers(0, highest << 23, dtype=np.uint32)
    return (bits | random.integers(0, 2, size, np.uint32) << np.uint32(31)).view(np.float32)


def stepped(case: tuple, start: int = 0) -> list[bytes]:
    """Apply updates of any values; return theta and all that the server keeps."""
    terms, seed, rounds, rate, momentum = case
    random, changes = np.random.default_rng(seed), {}
    if terms.strategy not in (Strategy.FED_DYN, Strategy.FED_ASYNC):
        changes["server_learning_rate"] = rate
    if terms.strategy in STRATEGIES_WITH["server_momentum"]:
        changes["server_momentum"] = momentum
    layout = (TrainableTensor("weight", (RULE_P,), 0),)
    rule, size = algorithm(replace(terms, **changes)), update_length(terms, layout)
    state = rule.init(any_values(random, RULE_P))
    for count in range(1, rounds + 1):
        mean = np.empty(start + size, np.float32)[start:]
        mean[:] = any_values(random, size)
        if terms.strategy is Strategy.FED_NOVA:
            mean[-1] = terms.auxiliary_scale  # steps: one, or the model would run away
        with np.errstate(over="ignore", invalid="ignore"):
            state = rule.apply(state, mean, count)
    return [vector.tobytes() for vector in (state.theta, *state.vectors)]


@pytest.mark.parametrize("mode", MODE_NAMES)
@settings(deadline=None)
@given(_of_rules)
def test_no_rule_depends_on_flushing_or_on_where_arrays_lie(mode, case):
    expected = stepped(case)
    assert stepped(case, start=3) == expected
    with flushing(mode):
        assert stepped(case) == expected


@settings(deadline=None)
@given(_of_rules)
def test_no_rule_leaves_a_number_that_could_be_flushed(case):
    for vector in stepped(case):
        found = np.frombuffer(vector, np.uint32)
        assert not ((found & 0x7FFFFFFF) < SMALLEST_NORMAL.view(np.uint32))[found != 0].any()


@given(theta=_bits, updates=st.lists(_bits, min_size=1, max_size=2), rate=_rates)
def test_a_step_leaves_no_number_that_could_be_flushed(theta, updates, rate):
    updates = [update.view(np.float32) for update in updates]
    found = np.frombuffer(applied(theta.view(np.float32), updates, rate), np.uint32)
    assert not ((found & 0x7FFFFFFF) < SMALLEST_NORMAL.view(np.uint32))[found != 0].any()


# sums


@dataclass(frozen=True)
class Sum:
    """The encoded sum of two updates: what a coordinator does is done once, for all agents."""

    protection: ProtectionName
    context: UpdateContext
    encoded: bytes

    def opened(self) -> np.ndarray:
        key, source = self.key, io.BytesIO(self.encoded)
        return protection(self.protection).open_sum(self.context, key, (0, 1), source).mean

    @property
    def key(self) -> RunKey | None:
        return None if self.protection == "plain" else KEY


def sum_of(seed: int, name: ProtectionName, clip: float) -> Sum:
    rng, own = np.random.default_rng(seed), [Mask(bytes([member]) * 32) for member in range(2)]
    masked = name in ("masked", "sealed")
    weight_cap, bits = (1, 100, 1 << 20)[seed % 3], (16, 8)[seed % 2]
    cohort = bytes(32) if masked else b""
    context = UpdateContext(bytes(range(16)), seed, 1, P, 4, weight_cap, clip, bits, cohort)
    total, key = protection(name).accumulator(context), Sum(name, context, b"").key
    for member in range(2):
        update = (rng.standard_normal(P) * clip / 3).astype(np.float32)
        update[: P // 4] *= np.float32(2.0**-100)  # in `plain`, with a small clip: subnormal
        masks = own[member : member + 1] if masked else None
        encoder = protection(name).encoder(context, member, key, rng, masks)
        total.add(member, io.BytesIO(b"".join(encoder.encode(update, 1))))
    correction = Correction(tuple(own)) if masked else None
    return Sum(name, context, b"".join(total.result(correction)))


def agents_theta(summed: Sum) -> bytes:
    """Open and apply a sum as an agent does."""
    theta = np.random.default_rng(0).normal(0, 0.1, P).astype(np.float32)
    theta[::7] = 0
    return applied(theta, [summed.opened()], 0.3)


CASES: list[tuple[int, ProtectionName, float]] = [
    (0, "plain", 1e-8),
    (1, "plain", 0.5),
    (2, "masked", 0.5),
    (3, "masked", 1e-19),
    (4, "sealed", 0.5),
    (5, "sealed", 1e-19),
]


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_opened_and_applied_sums_do_not_depend_on_flushing(mode, case):
    summed = sum_of(*case)
    expected, mean = agents_theta(summed), summed.opened().tobytes()
    with flushing(mode):
        assert summed.opened().tobytes() == mean
        assert agents_theta(summed) == expected


def test_the_cases_have_numbers_that_could_be_flushed():
    """Else the tests above could not fail."""
    sizes = np.abs([sum_of(*case).opened() for case in CASES])
    assert ((sizes > 0) & (sizes < SMALLEST_NORMAL)).any()


def digest_of_cases() -> str:
    """Ciphertexts differ each time: what is opened and applied does not."""
    digest = hashlib.sha256()
    for case in CASES:
        digest.update(agents_theta(sum_of(*case)))
    for seed, terms in enumerate(ALL_TERMS):
        digest.update(b"".join(stepped((terms, seed, 3, 0.3, 0.9))))
    return digest.hexdigest()


PROGRAM = """
from tests.crypto import test_equal_bits
print(test_equal_bits.digest_of_cases())
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
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": path} | changes,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest_of_cases()]


# places and pieces


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 8, 15])
def test_where_arrays_lie_does_not_show(start):
    mean = sum_of(*CASES[0]).opened()
    theta = np.random.default_rng(0).normal(0, 0.1, P).astype(np.float32)
    rule = federated_averaging(0.3)
    expected = rule.apply(ServerState(theta), mean.copy(), 1).theta.tobytes()
    moved_theta, moved_mean = np.empty(P + 16, np.float32), np.empty(P + 31, np.float32)
    moved_theta[start : start + P] = theta
    moved_mean[15 - start : 15 - start + P] = mean
    state = ServerState(moved_theta[start : start + P])
    found = rule.apply(state, moved_mean[15 - start : 15 - start + P], 1).theta
    assert found.tobytes() == expected
    assert found.base is moved_mean  # its memory was handed over


@pytest.mark.parametrize("size", [1, 7, 4096, 16_384, 19_999])
def test_pieces_make_the_same_whole(size):
    mean = sum_of(*CASES[0]).opened()[: min(P, 200 * size)]
    theta = np.random.default_rng(0).normal(0, 0.1, len(mean)).astype(np.float32)
    rule = federated_averaging(0.3)
    whole = rule.apply(ServerState(theta), mean.copy(), 1).theta
    pieces = [
        rule.apply(ServerState(theta[i : i + size]), mean[i : i + size].copy(), 1).theta
        for i in range(0, len(mean), size)
    ]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
