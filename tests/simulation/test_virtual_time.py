"""Runs on a virtual clock: what the state machine promises, seen from the devices."""

from typing import Any

import numpy as np
import pytest

from coordinator.run_state import RunPolicy
from edge_agent.engine import LocalUpdate
from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from fedloom.plans import TrainableTensor
from fedloom.terms import LocalTraining, Strategy
from simulation.settings import Settings
from simulation.virtual_time import Device, Moment, VirtualRun
from tests.strategies.samples import terms_of

LAYOUT = (TrainableTensor("weight", (2,), 0),)
TRANSFER = 1.0


def run(terms: LocalTraining, seconds: list[float], rounds: int, **policy: Any) -> list[Moment]:
    """Run devices of these speeds, each of which moves by 1 in every training."""

    def train(theta: Theta, terms: LocalTraining, number: int) -> LocalUpdate:
        return LocalUpdate(np.ones(2, np.float32), 1, 0.0)

    names = "abcdefgh"
    devices = {names[i]: Device(train, s, TRANSFER) for i, s in enumerate(seconds)}
    stated = RunPolicy(
        rounds=rounds,
        minimum_agents=policy.pop("minimum_agents", 1),
        cohort_size=policy.pop("cohort_size", len(seconds)),
        needs_key=False,
        gathering_seconds=1e6,
        training_seconds=1e6,
        upload_seconds=1e6,
        applying_seconds=1e6,
        max_staleness=terms.max_staleness,
        **policy,
    )
    return list(VirtualRun(stated, terms, LAYOUT, devices, np.zeros(2, np.float32)).moments())


def test_a_synchronous_round_takes_as_long_as_its_slowest_device() -> None:
    moments = run(terms_of(Strategy.FED_AVG), [1.0, 2.0, 50.0], rounds=3)
    assert [moment.seconds for moment in moments] == [52.0, 104.0, 156.0]
    assert [moment.theta[0] for moment in moments] == [1.0, 2.0, 3.0]


def test_a_quorum_goes_on_without_the_slowest_and_drops_its_update() -> None:
    moments = run(terms_of(Strategy.FED_AVG), [1.0, 2.0, 50.0], rounds=20, quorum=2)
    assert [moment.seconds for moment in moments] == [4.0 * n for n in range(1, 21)]


def test_an_asynchronous_round_takes_as_long_as_its_buffer_takes_to_fill() -> None:
    """c's update comes after 50 s, 12 rounds late, and counts for 1 / sqrt(13)."""
    terms = terms_of(Strategy.FED_BUFF, max_staleness=20)
    moments = run(terms, [1.0, 2.0, 50.0], rounds=14, buffer=2)
    assert [moment.seconds for moment in moments[:12]] == [4.0 * n for n in range(1, 13)]
    late = moments[12]
    assert late.staleness == (0, 12)
    assert late.seconds == 52.0
    assert late.theta[0] == pytest.approx(12 + (1 + 13**-0.5) / 2)


def test_an_update_that_gets_too_old_is_never_in_a_sum() -> None:
    terms = terms_of(Strategy.FED_BUFF, max_staleness=3)
    moments = run(terms, [1.0, 2.0, 50.0], rounds=40, buffer=2)
    assert {moment.staleness for moment in moments} == {(0, 0)}


def test_every_update_is_in_one_sum() -> None:
    """With a buffer of one and equal weights the model is the sum of all factors, none twice."""
    terms = terms_of(Strategy.FED_BUFF, max_staleness=50)
    moments = run(terms, [1.0, 1.7, 2.9, 11.3], rounds=60, buffer=1)
    expected = np.cumsum([(1 + moment.staleness[0]) ** -0.5 for moment in moments])
    np.testing.assert_allclose([moment.theta[0] for moment in moments], expected, rtol=1e-5)
    assert max(moment.staleness[0] for moment in moments) > 3


def test_a_simulation_without_a_clock_refuses_them() -> None:
    said = Settings(strategy="fed_buff", terms={"asynchronous": {"buffer": 3}})
    with pytest.raises(ConfigError, match=r'nobody is late.*"fed_avg" is the nearest'):
        said.config(clients=5, rounds=2)
