"""The functional form: a state goes in with a round's clients, the next state comes out.

process = learning_process(model, loss_fn, optimizer)
state = process.initialize()
state, report = process.next(state, [data_of_one, data_of_another])
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.local_rules import remembered
from fedloom.errors import ConfigError
from fedloom.strategies import algorithm
from simulation.clients import names
from simulation.conduct import Progress, conduct_round
from simulation.learning import as_model
from simulation.memories import Memories
from simulation.models import Model
from simulation.movers import Alone
from simulation.settings import Settings, Tables, strategy_remembers, training_of
from simulation.sums import Federation, RoundReport

_RUN_ID = bytes(16)


class Next(NamedTuple):
    """What a round leads to."""

    state: Progress
    report: RoundReport


class LearningProcess:
    """`initialize()`, then `next(state, client_data)` for each round; states are never changed."""

    def __init__(self, model: Model, settings: Settings, rounds: int) -> None:
        if strategy_remembers(settings.strategy):
            raise ConfigError(
                "strategy",
                f"expected one whose clients remember nothing, found {settings.strategy}: "
                "FederatedLearning knows its clients from round to round",
            )
        training = settings.config(1 << 7, rounds).training
        if training.error_feedback:
            raise ConfigError(
                "compression.error_feedback",
                "expected false, because clients remember nothing here: FederatedLearning knows "
                "its clients from round to round",
            )
        if remembered(training):
            raise ConfigError(
                "training",
                "expected nothing that clients keep from round to round (lora, personal): "
                "FederatedLearning knows its clients",
            )
        self._model = model
        self._settings = settings
        self._rounds = rounds

    def initialize(self) -> Progress:
        """Return the state before the first round."""
        training = self._settings.config(1 << 7, self._rounds).training
        return Progress(algorithm(training, self._model.plan.layout).init(self._model.theta.copy()))

    def next(self, state: Progress, client_data: Sequence[object]) -> Next:
        """Conduct a round in which these clients take part; all of them, unless `cohort_size`."""
        examples = [self._model.examples(data) for data in client_data]
        clients = dict(zip(names(len(examples)), examples, strict=True))
        federation = Federation(
            _RUN_ID,
            self._settings.config(len(clients), self._rounds),
            self._model.plan,
            {name: len(held) for name, held in clients.items()},
        )
        crew = Alone(self._model.work(clients, None).make())
        return Next(*conduct_round(federation, state, crew, Memories(Path(), 0, 0)))

    def model(self, state: Progress) -> Any:
        """Return the model of a state, as `FederatedLearning.get_global_model` does."""
        return self._model.trained(state.server.theta)


def learning_process(
    model: Any,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    optimizer: object = None,
    *,
    strategy: str = "fed_avg",
    protection: str = "plain",
    cohort_size: int = 0,
    seed: int = 0,
    terms: Tables | None = None,
    rounds: int = 100_000,
    vectorise: bool | None = None,
) -> LearningProcess:
    """Return a process; options as those of FederatedLearning, `rounds` for schedules."""
    settings = Settings(
        training_of(optimizer), strategy, protection, cohort_size, seed, terms or {}
    )
    return LearningProcess(as_model(model, loss_fn, vectorise), settings, rounds)
