"""Whole runs of which less than all travels: who sends what, what waits, and what comes of it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE, Role, TrainableTensor
from fedloom.strategies.random_mask import RandomMask
from tests.integration.federation import PARAMETERS, Agent, Federation, command, until
from tests.integration.test_restarts import all_agree
from tests.integration.test_strategies import distinct

ROUNDS, CLIP = 3, 0.01  # some values of every movement lie beyond the clip
BODY, TOLERANCE = 60, 2e-6
Float64 = np.ndarray
RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 3
size = 3
[training]
learning_rate = 0.01
seed = 5
{{training}}
[protection]
kind = "{{kind}}"
clip = {CLIP}
{{protection}}
[compression]
{{compression}}
"""


def start(
    federation: Federation, kind: str, compression: str, training: str = "", protection: str = ""
) -> bytes:
    """Queue a run as an operator does."""
    text = RUN.format(kind=kind, compression=compression, training=training, protection=protection)
    file = federation.folder / "run.toml"
    file.write_text(text)
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def masked(share: float) -> Callable[[int, Float64], Float64]:
    """Return the choice of a mask, as a function of the rounds before and of any vector."""

    def choose(number: int, waiting: Float64) -> Float64:
        count = int(np.ceil(share * len(waiting)))
        return RandomMask(5, number, len(waiting), count).places()

    return choose


def largest(share: float) -> Callable[[int, Float64], Float64]:
    """Return the choice of the largest."""

    def choose(number: int, waiting: Float64) -> Float64:
        del number
        return np.argsort(-np.abs(waiting), kind="stable")[: int(np.ceil(share * len(waiting)))]

    return choose


def by_the_book(
    theta: Float64,
    moved: Sequence[Sequence[Float64]],
    weights: Sequence[int],
    choose: Callable[[int, Float64], Float64],
    clip: float,
) -> Float64:
    """Error feedback in float64: arXiv:1901.09847v2, Algorithm 2, on every device."""
    waiting = [np.zeros(len(theta)) for _ in moved]
    for number in range(ROUNDS):
        total = np.zeros(len(theta))
        for index, weight in enumerate(weights):
            p = waiting[index] + moved[index][number]
            places = choose(number, p)
            sent = np.zeros(len(p))
            sent[places] = np.clip(p[places], -clip, clip)
            waiting[index] = p - sent
            total += weight * sent
        theta = theta + total / sum(weights)
    return theta


def sizes(agents: Sequence[Agent], run_id: bytes) -> set[int]:
    """Return how long the last uploads were."""
    return {(a.home / "runs" / run_id.hex() / "update.bin").stat().st_size for a in agents}


@pytest.mark.parametrize("kind", ["plain", "masked", "encrypted", "sealed"])
async def test_what_a_mask_leaves_out_and_a_clip_cuts_off_is_sent_later(
    federation: Federation, kind: str
) -> None:
    """A device dies in every round once its update may be in the sum: nothing is added twice."""
    agents = await federation.enrol_all()
    victim = agents[1]
    compression = 'kind = "random_mask"\nshare = 0.3\nerror_feedback = true'
    run_id = start(federation, kind, compression)
    folder = victim.home / "runs" / run_id.hex()
    for agent in agents:
        agent.start()
    for _ in range(2):
        await until("an update on its way", (folder / "memory.proposed").exists)
        await victim.stop()
        victim.start()
        await until("the round in the state", lambda: not (folder / "memory.proposed").exists())
    theta = await all_agree(federation, run_id, agents)
    moved = [[delta for delta, _ in distinct(agent)] for agent in agents]
    assert [len(one) for one in moved] == [ROUNDS] * 3
    expected = by_the_book(
        federation.initial_theta().astype(np.float64),
        moved,
        [agent.engine.samples for agent in agents],
        masked(0.3),
        np.inf if kind == "plain" else float(np.float32(CLIP)),
    )
    np.testing.assert_allclose(theta, expected, rtol=0, atol=TOLERANCE)
    assert not list(folder.glob("memory*"))
    if kind == "plain":
        assert sizes(agents, run_id) == {BODY + 4 * 1500}


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_unbiased_masks_count_for_their_strata(federation: Federation, kind: str) -> None:
    agents = await federation.enrol_all()
    run_id = start(federation, kind, 'kind = "random_mask"\nshare = 0.4')
    for agent in agents:
        agent.start()
    theta = await all_agree(federation, run_id, agents)
    expected = federation.initial_theta().astype(np.float64)
    clip = np.inf if kind == "plain" else float(np.float32(CLIP))
    weights = [agent.engine.samples for agent in agents]
    for number in range(ROUNDS):
        mask = RandomMask(5, number, PARAMETERS, 2000)
        moved = [np.clip(distinct(agent)[number][0], -clip, clip) for agent in agents]
        mean = np.average(moved, axis=0, weights=weights)
        expected[mask.places()] += mask.widths() * mean[mask.places()]
    np.testing.assert_allclose(theta, expected, rtol=0, atol=3 * TOLERANCE)


async def test_top_k_sends_the_largest_and_where_they_are(federation: Federation) -> None:
    agents = await federation.enrol_all()
    victim = agents[2]
    run_id = start(federation, "plain", 'kind = "top_k"\nshare = 0.1')
    folder = victim.home / "runs" / run_id.hex()
    for agent in agents:
        agent.start()
    await until("an update on its way", (folder / "memory.proposed").exists)
    await victim.stop()
    victim.start()
    theta = await all_agree(federation, run_id, agents)
    expected = by_the_book(
        federation.initial_theta().astype(np.float64),
        [[delta for delta, _ in distinct(agent)] for agent in agents],
        [agent.engine.samples for agent in agents],
        _as_the_agents(0.1),
        np.inf,
    )
    np.testing.assert_allclose(theta, expected, rtol=0, atol=1e-6)
    assert sizes(agents, run_id) == {BODY + 8 * 500}
    [record, *_] = federation.store.rounds(run_id)
    assert record.sum.size_bytes == BODY + 4 * PARAMETERS  # the sum is whole


def _as_the_agents(share: float) -> Callable[[int, Float64], Float64]:
    """Equal magnitudes are common here (movements are on a grid): which of them is numpy's."""

    def choose(number: int, waiting: Float64) -> Float64:
        del number
        count = int(np.ceil(share * len(waiting)))
        values = np.abs(waiting.astype(np.float32))
        return np.argpartition(values, len(values) - count)[len(values) - count :]

    return choose


async def test_quantised_updates_end_near_whole_ones(federation: Federation) -> None:
    agents = await federation.enrol_all()
    run_id = start(federation, "plain", 'kind = "quantised"', protection="")
    for agent in agents:
        agent.start()
    theta = await all_agree(federation, run_id, agents)
    expected = federation.initial_theta().astype(np.float64)
    weights = [agent.engine.samples for agent in agents]
    for number in range(ROUNDS):
        moved = [distinct(agent)[number][0] for agent in agents]
        expected += np.average(moved, axis=0, weights=weights)
    level = 2.0**-6 / 127  # a value is off by less than one in each round
    assert np.abs(theta - expected).max() < ROUNDS * level
    assert np.abs(np.mean(theta - expected)) < level / 10
    assert sizes(agents, run_id) == {BODY + 4 * 10 + PARAMETERS}


LAYOUT = (
    TrainableTensor("lora_A", (2, 1000), 0, Role.LORA_A),
    TrainableTensor("lora_B", (1400, 2), 2000, Role.LORA_B),
    TrainableTensor("classifier", (200,), 4800, Role.HEAD),
)


@pytest.fixture
def adapter_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the toy plan the roles of an adapter with a head; to be asked for first."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", LAYOUT)


async def test_a_mask_goes_with_parts_with_an_adaptive_server_and_with_either_release(
    adapter_plan: None, federation: Federation, tmp_path: Path
) -> None:
    """The coordinator repeats from the sums what the agents did, to the bit."""
    del adapter_plan
    agents = await federation.enrol_all()
    for agent in agents:
        agent.permitted_release = agent.permitted_release.COORDINATOR
    run_id = start(
        federation,
        "sealed",
        'kind = "random_mask"\nshare = 0.5\nerror_feedback = true',
        'lora = "rolora"\nstrategy = "fed_adam"',
        'release = "coordinator"',
    )
    for agent in agents:
        agent.start()
    theta = await all_agree(federation, run_id, agents)
    initial = federation.initial_theta()
    a, rest = slice(0, 2000), slice(2000, 5000)
    assert np.count_nonzero(theta[a] != initial[a]) <= 1000 + 100  # half of A and head, in round 2
    assert np.count_nonzero(theta[rest] != initial[rest]) > 1500  # in two rounds
    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), theta)


@pytest.mark.parametrize(
    ("kind", "compression"),
    [
        ("sealed", 'kind = "random_mask"\nerror_feedback = true'),
        ("plain", 'kind = "top_k"'),
        ("plain", 'kind = "quantised"'),
    ],
)
async def test_quality_travels_whole(federation: Federation, kind: str, compression: str) -> None:
    agents = await federation.enrol_all()
    run_id = start(federation, kind, f'{compression}\n[evaluation]\nreport = "mean"', protection="")
    for agent in agents:
        agent.start()
    await all_agree(federation, run_id, agents)
    told = json.loads(command("run", "watch", "--json", "--home", federation.home))["history"]
    assert [entry["began_with"]["accuracy"] for entry in told] == pytest.approx([0.7] * ROUNDS)


@pytest.mark.parametrize(
    ("kind", "more", "nearest"),
    [
        ("top_k", "", "random_mask"),
        ("quantised", "", "protection.update_bits = 8"),
        ("random_mask", "share = 1.0", "below 1"),
    ],
)
def test_what_cannot_be_added_is_refused_before_the_run_starts(
    federation: Federation, kind: str, more: str, nearest: str
) -> None:
    with pytest.raises(BaseException, match=nearest):
        start(federation, "sealed", f'kind = "{kind}"\n{more}')
    assert federation.store.runs() == []
