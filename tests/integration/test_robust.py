"""Whole runs in which an agent sends what it likes: the others' model is none of its business."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.engine import LocalUpdate
from tests.integration.engines import LARGEST_VALUE
from tests.integration.federation import Federation, command, until
from tests.integration.test_restarts import all_agree
from tests.integration.test_strategies import distinct

RUN = """
name = "toy"
plan = "plan"
rounds = 2
[cohort]
minimum = 5
size = 5
[training]
learning_rate = 0.01
[protection]
kind = "{kind}"
[aggregation]
{aggregation}
"""


def spoilt(update: LocalUpdate) -> LocalUpdate:
    """Send a huge step in the wrong direction."""
    return replace(update, delta=np.float32(-1e6) * update.delta)


def run_file(federation: Federation, kind: str, aggregation: str) -> str:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, aggregation=aggregation))
    return command("run", "start", file, "--home", federation.home)


@pytest.mark.parametrize("rule", ["median", "multi_krum"])
async def test_one_of_five_decides_nothing(federation: Federation, rule: str) -> None:
    """The coordinator stops in round 2, too, and goes on with what is spooled."""
    agents = await federation.enrol_all((30, 50, 100, 20, 40))
    agents[1].engine._spoil = spoilt
    agents[4].engine.pauses_at = 2
    aggregation = f'rule = "{rule}"' + ("\nfaulty = 1" if "krum" in rule else "")
    run_id = bytes.fromhex(run_file(federation, "plain", aggregation))
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[4].engine.begun == 2)
    await federation.stop()
    agents[4].engine.may_finish.set()
    await federation.start()
    theta = await all_agree(federation, run_id, agents)
    assert np.abs(theta - federation.initial_theta()).max() <= 2 * LARGEST_VALUE + 1e-6
    if rule == "median":
        expected = federation.initial_theta().astype(np.float64)
        for number in range(2):
            expected += np.median([distinct(agent)[number][0] for agent in agents], axis=0)
        np.testing.assert_allclose(theta, expected, rtol=0, atol=1e-6)


def test_krum_under_masks_is_refused_before_the_run_starts(federation: Federation) -> None:
    with pytest.raises(BaseException, match="reads every update"):
        run_file(federation, "sealed", 'rule = "krum"\nfaulty = 1')
    assert federation.store.runs() == []
