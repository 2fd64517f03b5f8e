"""What a person says of a simulated run, as the terms of one: the tables of `run.toml`."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.config import SMALLEST_MASKED_COHORT, RunConfig, parse_run_config
from fedloom.errors import ConfigError
from fedloom.terms import STRATEGIES_WITH, Strategy

Tables = Mapping[str, Mapping[str, Any]]
_OPTIMIZERS = {"SGD": "sgd", "Adam": "adamw", "AdamW": "adamw", "Adagrad": "adagrad"}
_HERE = Path("FederatedLearning")  # named in errors, in place of a file
# What of torch's optimisers ours have no name for, and the one value that they have.
_FIXED: dict[str, Any] = {
    "dampening": 0,
    "nesterov": False,
    "betas": (0.9, 0.999),
    "amsgrad": False,
    "maximize": False,
    "lr_decay": 0,
    "initial_accumulator_value": 0,
}
_EPSILONS = {"adamw": 1e-8, "adagrad": 1e-10}


@dataclass(frozen=True)
class Settings:
    """What is said of a run besides its model and its clients; see FederatedLearning."""

    optimizer: Mapping[str, Any] = field(default_factory=dict)  # keys of [training]
    strategy: str = "fed_avg"
    protection: str = "plain"
    cohort_size: int = 0  # 0: all clients
    seed: int = 0
    terms: Tables = field(default_factory=dict)

    def config(self, clients: int, rounds: int) -> RunConfig:
        """Return the run's terms with so many clients; raises ConfigError that names everything."""
        size = self.cohort_size or clients
        masked = self.protection in ("masked", "sealed")
        minimum = SMALLEST_MASKED_COHORT if masked else 1
        table: dict[str, Any] = {
            "name": "simulation",
            "plan": "model",
            "rounds": rounds,
            "cohort": {"size": size, "minimum": minimum, **self._population(clients)},
            "training": {"strategy": self.strategy, "seed": self.seed, **self.optimizer},
            "protection": {"kind": self.protection},
        }
        for name, values in self.terms.items():
            table[name] = {**table.get(name, {}), **values}
        config = parse_run_config(table, _HERE)
        if config.training.is_asynchronous:
            raise ConfigError(
                "strategy",
                "expected a synchronous one: no clock runs here and nobody is late, so there is "
                f'nothing to wait for, found {config.training.strategy.name.lower()}; "fed_avg" is '
                "the nearest, and `simulation.virtual_time` has devices of different speeds",
            )
        return config

    def _population(self, clients: int) -> dict[str, int]:
        counted = {strategy.name.lower() for strategy in STRATEGIES_WITH["population"]}
        return {"population": clients} if self.strategy in counted else {}


def training_of(optimizer: object) -> dict[str, Any]:
    """Return what an optimiser says in [training]'s words.

    A name ("sgd", "adamw", "adagrad"), one of torch's classes SGD, Adam, AdamW and Adagrad, a
    `functools.partial` of one, or an instance, whose parameters are not looked at. Raises
    ConfigError for what would be something else on a device.
    """
    if optimizer is None:
        return {}
    if isinstance(optimizer, str):
        return {"optimizer": optimizer.lower()}
    kind, said = _said(optimizer)
    if kind not in _OPTIMIZERS:
        raise ConfigError(
            "optimizer", f"expected one of {', '.join(_OPTIMIZERS)}, or its name, found {kind}"
        )
    name = _OPTIMIZERS[kind]
    for option, only in {**_FIXED, "eps": _EPSILONS.get(name)}.items():
        if option in said and said[option] != only:
            raise ConfigError(
                "optimizer", f"expected {kind} with {option} = {only}, found {said[option]}"
            )
    if kind == "Adam" and said["weight_decay"]:
        raise ConfigError("optimizer", "expected AdamW for a weight decay, found Adam")
    training = {
        "optimizer": name,
        "learning_rate": float(said["lr"]),
        "weight_decay": float(said["weight_decay"]),
    }
    if said.get("momentum"):
        training["momentum"] = float(said["momentum"])
    return training


def _said(optimizer: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(getattr(optimizer, "defaults", None), dict):
        return type(optimizer).__name__, optimizer.defaults
    given: Mapping[str, Any] = {}
    if isinstance(optimizer, partial):
        optimizer, given = optimizer.func, optimizer.keywords
    if not isinstance(optimizer, type):
        raise ConfigError(
            "optimizer", f"expected a torch optimizer or its name, found {optimizer!r}"
        )
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(optimizer).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return optimizer.__name__, {**defaults, **given}


def strategy_remembers(name: str) -> bool:
    """Whether clients of a strategy must be known from round to round."""
    from fedloom.strategies import RULES

    known = {strategy.name.lower(): strategy for strategy in Strategy}
    return name in known and bool(RULES[known[name]].remembers)
