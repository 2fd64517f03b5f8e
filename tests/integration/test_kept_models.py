"""Real rounds end in versions that answer on the device, where the run's gate lets them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.model_versions import Active
from edge_agent.statements import Statement
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE
from tests.integration.engines import two_classes
from tests.integration.federation import LAYOUT, Agent, Federation, command
from tests.integration.test_rounds import SAMPLES, complete

ROUNDS = 2


def start_run(federation: Federation, activation: str) -> bytes:
    file = federation.folder / "run.toml"
    file.write_text(
        f'name = "toy"\nplan = "plan"\nrounds = {ROUNDS}\n[cohort]\nminimum = 3\nsize = 10\n'
        f'[training]\nlearning_rate = 1e-2\n[protection]\nkind = "masked"\n'
        f"[activation]\n{activation}\n"
    )
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def statements(agent: Agent) -> Iterator[Statement]:
    [adapter] = agent.models.adapters()
    for said in agent.models.versions(adapter):
        assert isinstance(said, Statement)
        yield said


def active(agent: Agent) -> Active | None:
    [adapter] = agent.models.adapters()
    return agent.models.active(adapter)


def adapters_in(home: Path) -> list[Path]:
    return list((home / "models").rglob(ADAPTER_FILE))


async def test_every_round_leaves_a_version_and_the_newest_answers(federation: Federation) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = federation.start_run("masked", rounds=ROUNDS)
    await complete(federation, run_id, agents)
    for agent in agents:
        found = list(statements(agent))
        assert [(said.version, said.round) for said in found] == [(1, 1), (2, 2)]
        assert {said.run for said in found} == {run_id.hex()}
        assert {said.agent for said in found} == {agent.name}
        assert active(agent) == Active(2)
        first = agent.models.path(found[0].adapter, 1) / ADAPTER_FILE
        assert not np.array_equal(read_adapter(first, LAYOUT), agent.theta(run_id))


@pytest.mark.parametrize("bound", ["minimum_accuracy = 0.6", "maximum_perplexity = 2"])
async def test_each_device_refuses_what_is_bad_on_its_own_data(
    federation: Federation, bound: str
) -> None:
    agents = await federation.enrol_all(SAMPLES)
    good, bad, unmeasured = agents
    good.engine.evaluation = two_classes(10, 9, 0.2)
    bad.engine.evaluation = two_classes(10, 3, 2.0)
    unmeasured.engine.evaluation = None
    run_id = start_run(federation, bound)
    await complete(federation, run_id, agents)  # the run itself does not depend on it
    assert active(good) == Active(2)
    assert active(bad) is None
    assert active(unmeasured) is None
    assert all("found" in said.refused for said in statements(bad))
    assert all("held_out" in said.refused for said in statements(unmeasured))
    assert len(list(statements(bad))) == ROUNDS
    assert adapters_in(bad.home) == []
