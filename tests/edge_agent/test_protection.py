"""What an update's bytes follow from: rounding that can be repeated, a clip that all derive."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crypto
from edge_agent.invitations import Terms
from edge_agent.protection import UpdateProtection
from fedloom.artifacts import ArtifactReference
from fedloom.terms import Encoding, LocalTraining, Protection, Release, clip_of

_runs = st.tuples(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**64 - 1),  # seed
    st.integers(1, 2**32 - 1),  # round
    st.sampled_from(["a", "b", "agent-1", "agent-11"]),
)


def protection(
    run_id: bytes = bytes(16), seed: int = 0, agent: str = "agent", clip: float = 0.0
) -> UpdateProtection:
    """Return a device's side of a run."""
    terms = Terms(
        run_id,
        1,
        ArtifactReference(bytes(32), 1),
        LocalTraining(seed=seed),
        Encoding(Protection.MASKED, clip=clip),
        Release.AGENTS,
        3,
    )
    return UpdateProtection(terms, lambda: 100, agent)


@given(_runs, _runs)
def test_rounding_follows_from_run_seed_round_and_agent_alone(
    one: tuple[bytes, int, int, str], other: tuple[bytes, int, int, str]
) -> None:
    drawn = []
    for run_id, seed, round_number, agent in (one, other, one):
        rounding = protection(run_id, seed, agent)._rounding(round_number)
        drawn.append(rounding.random(8).tolist())
    assert drawn[0] == drawn[2]
    assert (drawn[0] == drawn[1]) == (one == other)


def test_the_last_parts_of_a_seed_do_not_run_into_each_other() -> None:
    rounds, agents = (1, 11), ("agent", "1/agent", "/agent")
    drawn = {
        tuple(protection(agent=agent)._rounding(number).random(4).tolist())
        for number, agent in itertools.product(rounds, agents)
    }
    assert len(drawn) == 6


@given(
    cap=st.integers(1, 1 << 24),
    derived=st.floats(1e-20, 1e20),
    stated=st.floats(1e-20, 1e20),
)
def test_a_stated_clip_goes_before_a_derived_one_and_that_before_the_bound(
    cap: int, derived: float, stated: float
) -> None:
    assert protection(clip=stated).clip(cap, derived) == stated
    assert protection().clip(cap, derived) == derived
    bound = clip_of(Encoding(Protection.MASKED), LocalTraining(), cap)
    assert protection().clip(cap, 0.0) == bound


@pytest.mark.parametrize("place", range(13))
def test_the_next_clip_is_that_of_the_histogram(place: int) -> None:
    histogram = tuple(int(bucket == place) for bucket in range(13))
    opened = crypto.OpenedSum(np.zeros(1, np.float32), 1, 0, 1, histogram)
    plain = crypto.OpenedSum(np.zeros(1, np.float32), 1, 0, 1)
    assert protection().next_clip(0.5, opened) == 0.5 * 2.0 ** (place - 10)
    assert protection(clip=0.5).next_clip(0.5, opened) == 0
    assert protection().next_clip(0.5, plain) == 0
