"""No bytes crash, hang or bloat a parser: about 7,000 cases, 150,000 with `--fuzz`."""

import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .parsers import PARSERS, run_one, sealed_parsers

BYTES = st.one_of(
    st.binary(max_size=80),
    st.binary(min_size=100, max_size=600),
    st.tuples(st.sampled_from(range(1, 8)), st.binary(max_size=300)).map(
        lambda pair: bytes([5, pair[0]]) + bytes(16) + pair[1]
    ),
)
LIMIT = 16 << 20


def fuzz(cases, parsers, strategy=BYTES):
    @settings(
        max_examples=cases,
        deadline=2000,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def case(data):
        run_one(data, parsers)

    case()


@pytest.mark.parametrize("place", sorted(set(range(len(PARSERS))) - {6, 7}))
def test_bytes_end_in_a_value_or_a_refusal(place, request):
    cases = 8_000 if request.config.getoption("fuzz") else 400
    parser = PARSERS[place]
    fuzz(cases, (parser,))


def test_bytes_before_seal_end_in_a_value_or_a_refusal(request):
    for parser in sealed_parsers():
        fuzz(7_000 if request.config.getoption("fuzz") else 300, (parser,))


def test_no_parser_bloats_the_process(request):
    """Without hypothesis, which remembers its cases: 16 MiB at most over all of them."""
    cases = 50_000 if request.config.getoption("fuzz") else 2_000
    random = np.random.default_rng(0)
    parsers = (*PARSERS, *sealed_parsers())
    for place in range(200):  # caches and SEAL's memory pool fill first
        run_one(bytes([place]) + random.bytes(100), parsers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        run_one(random.bytes(int(random.integers(1, 600))), parsers)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < LIMIT
