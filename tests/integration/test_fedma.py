"""A whole run that matches neurons: what the coordinator publishes is every agent's next model."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.plans.permutations import permuted
from edge_agent.checkpoints import Checkpoint
from edge_agent.engine import LocalUpdate, Progress
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE, TrainableTensor
from fedloom.strategies.fedma import chain, open_layers
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining
from tests.integration.engines import FakeEngine
from tests.integration.federation import Federation, command, until
from tests.integration.test_restarts import all_agree

LAYOUT = (  # two hidden layers; 5,000 values in all
    TrainableTensor("0.weight", (66, 12), 0),
    TrainableTensor("0.bias", (66,), 792),
    TrainableTensor("2.weight", (60, 66), 858),
    TrainableTensor("2.bias", (60,), 4818),
    TrainableTensor("4.weight", (2, 60), 4878),
    TrainableTensor("4.bias", (2,), 4998),
)
ROUNDS = 5
_SECOND = np.r_[4938:4998, 4999]  # what leads to the second label
RUN = """
name = "toy"
plan = "plan"
rounds = {rounds}
[cohort]
minimum = 3
size = 3
[training]
strategy = "fed_ma"
learning_rate = 0.01
{training}
[protection]
kind = "{kind}"
[aggregation]
{aggregation}
"""


@pytest.fixture(autouse=True)
def chain_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the toy plan a chain of layers."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", LAYOUT)


class Shuffling(FakeEngine):
    """Ends a training with its hidden neurons in another order: as good a model."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.honest: dict[bytes, Theta] = {}  # what it moved before that, by where it began

    def train(
        self,
        theta: Theta,
        terms: LocalTraining,
        order_seed: int,
        progress: Progress,
        checkpoint: Checkpoint,
        linear: Theta | None = None,
        parts: Parts | None = None,
    ) -> LocalUpdate:
        update = super().train(theta, terms, order_seed, progress, checkpoint, linear, parts)
        assert parts is not None
        rounds = len(self.honest) - (theta.tobytes() in self.honest)
        assert parts.shared[0].start == open_layers(LAYOUT, rounds)[0].start
        self.honest[theta.tobytes()] = update.delta.copy()
        ended, layers = theta + update.delta, chain(LAYOUT)
        for hidden in range(rounds % 3, 2):
            order = np.random.default_rng(order_seed).permutation(layers[hidden].weight.shape[0])
            ended = permuted(ended, layers, hidden, order)
        return replace(update, delta=ended - theta, label_counts=(self.samples, 70))


def start(
    federation: Federation, kind: str = "plain", training: str = "", aggregation: str = ""
) -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    values = {"kind": kind, "training": training, "aggregation": aggregation}
    file.write_text(RUN.format(rounds=ROUNDS, **values))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home).split()[-1])


async def test_neurons_are_matched_whatever_their_order(federation: Federation) -> None:
    """The coordinator stops in round 2, too, and goes on with what is spooled."""
    agents = await federation.enrol_all((30, 50, 100))
    for agent in agents:
        agent.engine = Shuffling(agent.engine.samples)
    agents[0].engine.pauses_at = 2
    run_id = start(federation)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    await federation.stop()
    agents[0].engine.may_finish.set()
    await federation.start()
    theta = await all_agree(federation, run_id, agents)

    # The device with most samples gives the order; undo it, and there is a weighted mean.
    samples = np.array([agent.engine.samples for agent in agents], np.float64)
    moved = [list(agent.engine.honest.items()) for agent in agents]  # type: ignore[attr-defined]
    begun = [np.frombuffer(before, np.float32) for before, _ in moved[0]]
    np.testing.assert_array_equal(begun[0], federation.initial_theta())
    assert len(begun) == ROUNDS
    for number, before in enumerate(begun):
        after = begun[number + 1] if number + 1 < ROUNDS else theta
        opened = slice(open_layers(LAYOUT, number)[0].start, None)
        deltas = np.stack([one[number][1] for one in moved]).astype(np.float64)
        expected = before + samples @ deltas / samples.sum()
        expected[_SECOND] = before[_SECOND] + deltas.mean(axis=0)[_SECOND]  # 70 rows of all
        if opened.start:
            np.testing.assert_array_equal(after[: opened.start], before[: opened.start])
        undone = ordered_as(expected.astype(np.float32), after, number % 3)
        np.testing.assert_allclose(undone[opened], after[opened], rtol=0, atol=2e-6)
    folder = federation.folder / "exported"
    command("run", "export", "--out", folder, "--home", federation.home)
    np.testing.assert_array_equal(read_adapter(folder / ADAPTER_FILE, LAYOUT), theta)


def ordered_as(theta: Theta, other: Theta, first: int) -> Theta:
    """Give the hidden layers from `first` on the order that they have in another model."""
    layers = chain(LAYOUT)
    for hidden in range(first, 2):
        bias = layers[hidden].bias
        assert bias is not None
        values = slice(bias.offset, bias.offset + bias.size)
        mine, theirs = np.argsort(theta[values]), np.argsort(other[values])
        order = np.empty_like(mine)
        order[theirs] = mine
        theta = permuted(theta, layers, hidden, order)
    return theta


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "sealed"}, 'matches the neurons of every agent.*use protection.kind = "plain"'),
        ({"aggregation": 'rule = "median"'}, 'expected rule = "mean" and one group'),
        ({"training": 'lora = "ffa"'}, "lora FEDIT and personal NONE"),
    ],
)
def test_what_does_not_go_together_is_refused(
    federation: Federation, wrong: dict[str, str], told: str
) -> None:
    with pytest.raises(BaseException, match=told):
        start(federation, **wrong)
    assert federation.store.runs() == []


async def test_a_plan_that_is_no_chain_is_refused_by_its_tensor(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = TrainableTensor("1.weight", (66,), 792)
    monkeypatch.setattr("tests.integration.federation.LAYOUT", (LAYOUT[0], norm, *LAYOUT[2:]))
    federation = Federation(tmp_path_factory.mktemp("norm"))
    try:
        with pytest.raises(BaseException, match=r"tensor 1\.weight of shape \(66,\).*use fed_avg"):
            start(federation)
    finally:
        await federation.close()
