"""No bytes crash, hang or bloat a parser: about 5,000 cases, 100,000 with `--fuzz`."""

import resource

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


@pytest.fixture
def memory():
    """Refuse growth of the process above 16 MiB over all cases of a test."""
    run_one(bytes([0]) * 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < LIMIT


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
def test_bytes_end_in_a_value_or_a_refusal(place, memory, request):
    cases = 8_000 if request.config.getoption("fuzz") else 400
    parser = PARSERS[place]
    fuzz(cases, (parser,))


def test_bytes_before_seal_end_in_a_value_or_a_refusal(request):
    parsers = sealed_parsers()
    for parser in parsers:  # SEAL's memory pool grows first
        parser_case = bytes([0, 1, 2, 9, 9])
        run_one(parser_case, (parser,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for parser in parsers:
        fuzz(7_000 if request.config.getoption("fuzz") else 300, (parser,))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < LIMIT
