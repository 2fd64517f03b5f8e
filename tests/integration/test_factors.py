"""Whole runs whose coordinator takes every device's factors and gives new ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE, PlanOrigin, Role, TrainableTensor
from tests.integration.federation import Agent, Federation, command, until
from tests.integration.test_parts import completed, moved

ROUNDS = 3
ALPHA, RANK = 6.0, 2
LAYOUT = (
    TrainableTensor("lora_A", (2, 40), 0, Role.LORA_A),
    TrainableTensor("lora_B", (60, 2), 80, Role.LORA_B),
    TrainableTensor("classifier", (2400,), 200, Role.HEAD),
    TrainableTensor("residual", (60, 40), 2600, Role.RESIDUAL),
)
A, B, HEAD, RESIDUAL = slice(0, 80), slice(80, 200), slice(200, 2600), slice(2600, 5000)
PLAIN_HEADER = 60
RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 3
size = 3
[training]
weighting = "uniform"
local_steps = 4
lora = "{{lora}}"
{{training}}
[protection]
kind = "{{kind}}"
clip = 0.0625
[evaluation]
report = "{{report}}"
"""


@pytest.fixture(autouse=True)
def residual_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the toy plan the roles of an adapter with a residual."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", LAYOUT)
    origin = PlanOrigin("none", RANK, ALPHA)
    monkeypatch.setattr("tests.integration.federation.ORIGIN", origin)


def start(
    federation: Federation, lora: str, kind: str = "plain", training: str = "", report: str = "mean"
) -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(lora=lora, kind=kind, training=training, report=report))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def weight(theta: Any) -> Any:
    """Return what a model adds to the frozen weight."""
    theta = np.asarray(theta, np.float64)
    product = theta[B].reshape(60, 2) @ theta[A].reshape(2, 40)
    return theta[RESIDUAL].reshape(60, 40) + ALPHA / RANK * product


def sent(agent: Agent) -> list[tuple[Theta, Theta]]:
    """Return, for each round, the model that an agent trained from and the one it came to.

    It moves the residual as well, as this engine moves anything: what rests is not sent.
    """
    found = {one.theta.tobytes(): one for one in agent.engine.history}
    pairs = []
    for one in found.values():
        after = one.theta.astype(np.float64) + one.update.delta
        after[RESIDUAL] = one.theta[RESIDUAL]
        pairs.append((one.theta, after))
    return pairs


@pytest.mark.parametrize("lora", ["flexlora", "flora", "fedex"])
async def test_new_factors_reach_every_device(
    federation: Federation, tmp_path: Path, lora: str
) -> None:
    """The coordinator stops in round 2, too, and knows the model again from its sums."""
    agents = await federation.enrol_all()
    agents[0].engine.pauses_at = 2
    run_id = start(federation, lora)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    await federation.stop()
    agents[0].engine.may_finish.set()
    await federation.start()
    models = await completed(federation, run_id, agents)
    trained = [sent(agent) for agent in agents]
    begun = [*(before for before, _ in trained[0]), models[0]]
    assert len(begun) == ROUNDS + 1
    for number, after in enumerate(begun[1:]):
        local = [rounds[number][1] for rounds in trained]
        assert all(np.array_equal(rounds[number][0], begun[number]) for rounds in trained)
        mean = np.mean([weight(model) for model in local], axis=0)
        if lora == "flexlora":
            kept = begun[number][RESIDUAL].reshape(60, 40)
            u, s, v = np.linalg.svd((mean - kept) / (ALPHA / RANK), full_matrices=False)
            mean = kept + ALPHA / RANK * (u[:, :2] * s[:2]) @ v[:2]
            np.testing.assert_array_equal(after[RESIDUAL], begun[number][RESIDUAL])
        np.testing.assert_allclose(weight(after), mean, rtol=0, atol=2e-5)
        heads = np.mean([model[HEAD] for model in local], axis=0)
        np.testing.assert_allclose(after[HEAD], heads, rtol=0, atol=1e-6)
        if lora == "flora":
            assert not after[B].any()
            assert not np.array_equal(after[A], begun[number][A])
    for model in models:
        assert np.array_equal(model, models[0])
    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), models[0])


async def test_a_device_that_lost_its_state_has_it_again_from_the_sums(
    federation: Federation,
) -> None:
    """What goes up has no residual, what comes down has."""
    agents = await federation.enrol_all()
    agents[0].engine.pauses_at = agents[1].engine.pauses_at = 3
    run_id = start(federation, "fedex", report="none")
    for agent in agents:
        agent.start()
    await until("round 3", lambda: agents[0].engine.begun == agents[1].engine.begun == 3)
    agents[0].engine.may_finish.set()
    await agents[0].stop()
    [state] = (agents[0].home / "runs" / run_id.hex()).glob("after-round-2.safetensors")
    state.unlink()
    agents[0].start()
    agents[1].engine.may_finish.set()
    models = await completed(federation, run_id, agents)
    sizes = [record.sum.size_bytes - PLAIN_HEADER for record in federation.store.rounds(run_id)]
    assert sizes == [4 * 5000] * ROUNDS
    for agent, model in zip(agents, models, strict=True):
        assert np.array_equal(model, models[0])
        assert not np.array_equal(model[RESIDUAL], federation.initial_theta()[RESIDUAL])
        assert len({before.tobytes() for before, _ in sent(agent)}) == ROUNDS


async def test_a_plan_with_residuals_goes_with_every_other_rule(federation: Federation) -> None:
    """They rest, under any protection."""
    agents = await federation.enrol_all()
    run_id = start(federation, "fedit", "sealed")
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    initial = federation.initial_theta()
    expected = initial.astype(np.float64)
    expected[: RESIDUAL.start] += sum(
        np.mean([moved(agent)[number] for agent in agents], axis=0)[: RESIDUAL.start]
        for number in range(ROUNDS)
    )
    for model in models:
        np.testing.assert_allclose(model, expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(model[RESIDUAL], initial[RESIDUAL])


def test_what_cannot_go_together_is_refused_before_the_run_starts(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("masked", "sealed"):
        with pytest.raises(BaseException, match="needs every device's factors"):
            start(federation, "fedex", kind)
    with pytest.raises(BaseException, match="lora FFA"):
        start(federation, "flora", training='strategy = "fed_avg_m"')
    assert federation.store.runs() == []
