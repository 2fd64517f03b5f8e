"""The terms of a run: what every agent and the coordinator must agree on before anyone trains.

Frozen values with their limits; `from_message` is the border where protobuf forms are validated.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Self, TypeVar

from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

MAX_EPOCHS = 1_000
MAX_BATCH_SIZE = 65_536
MAX_CAPACITY = 10_000
MAX_WEIGHT_CLASS = 24  # weights (sample counts) up to 2^24 per agent and round
UPDATE_BITS = (16, 8)
CLIP_MARGIN = 1.25  # on Adam's movement in a round
MINIMUM_SUM = 3  # fewest updates in a sum under masks: each device insists, whoever asks

_E = TypeVar("_E", bound=IntEnum)


class Protection(IntEnum):
    """How updates are protected; a larger value hides more from the coordinator alone."""

    PLAIN = 1
    MASKED = 2
    ENCRYPTED = 3
    SEALED = 4

    @property
    def has_masks(self) -> bool:
        """Whether members of a cohort hide their updates from everyone by masks."""
        return self in (Protection.MASKED, Protection.SEALED)

    @property
    def has_run_key(self) -> bool:
        """Whether the agents share a key that the coordinator must not have."""
        return self is not Protection.PLAIN

    @property
    def needs_tenseal(self) -> bool:
        """Whether updates are homomorphically encrypted."""
        return self in (Protection.ENCRYPTED, Protection.SEALED)


class Release(IntEnum):
    """Who gets the opened sums of a run whose protection hides them from the coordinator."""

    AGENTS = 1
    COORDINATOR = 2

    @classmethod
    def from_message(cls, value: control_pb2.Release.ValueType) -> Self:
        """Validate what a peer sent."""
        return _member(cls, value)


class Optimizer(IntEnum):
    """Local optimiser."""

    SGD = 1
    ADAMW = 2


class Strategy(IntEnum):
    """Federated algorithm."""

    FED_AVG = 1
    FED_PROX = 2


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {what}, found {found}")


def _finite_at_least_zero(name: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, f"{name} to be finite and at least 0", value)


@dataclass(frozen=True)
class LocalTraining:
    """How an agent trains for one round; raises Refused(MALFORMED) when a value is out of range."""

    strategy: Strategy = Strategy.FED_AVG
    optimizer: Optimizer = Optimizer.ADAMW
    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    proximal_mu: float = 0.0
    server_learning_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.epochs <= MAX_EPOCHS, f"epochs in 1..{MAX_EPOCHS}", self.epochs)
        _require(
            1 <= self.batch_size <= MAX_BATCH_SIZE,
            f"batch_size in 1..{MAX_BATCH_SIZE}",
            self.batch_size,
        )
        for name in ("learning_rate", "weight_decay", "proximal_mu", "server_learning_rate"):
            _finite_at_least_zero(name, getattr(self, name))
        _require(self.learning_rate > 0, "learning_rate above 0", self.learning_rate)
        _require(0 <= self.momentum < 1, "momentum in [0, 1)", self.momentum)
        _require(0 <= self.seed < 2**64, "seed in 0..2^64-1", self.seed)
        _require(
            self.proximal_mu == 0 or self.strategy is Strategy.FED_PROX,
            "proximal_mu 0 unless the strategy is FED_PROX",
            self.proximal_mu,
        )

    @classmethod
    def from_message(cls, message: control_pb2.LocalTraining) -> Self:
        """Validate what a peer sent."""
        return cls(
            strategy=_member(Strategy, message.strategy),
            optimizer=_member(Optimizer, message.optimizer),
            epochs=message.epochs,
            batch_size=message.batch_size,
            learning_rate=message.learning_rate,
            weight_decay=message.weight_decay,
            momentum=message.momentum,
            proximal_mu=message.proximal_mu,
            server_learning_rate=message.server_learning_rate,
            seed=message.seed,
        )

    def to_message(self) -> control_pb2.LocalTraining:
        """Return the form that travels."""
        return control_pb2.LocalTraining(
            strategy=control_pb2.Strategy.ValueType(self.strategy),
            optimizer=control_pb2.Optimizer.ValueType(self.optimizer),
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            proximal_mu=self.proximal_mu,
            server_learning_rate=self.server_learning_rate,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Encoding:
    """How updates are encoded: `capacity` is K_max, the most updates that one sum may hold."""

    protection: Protection
    capacity: int = 100
    clip: float = 0.0  # 0: derived for each cohort by `clip_of`
    update_bits: int = 16

    def __post_init__(self) -> None:
        _require(
            1 <= self.capacity <= MAX_CAPACITY, f"capacity in 1..{MAX_CAPACITY}", self.capacity
        )
        _finite_at_least_zero("clip", self.clip)
        _require(self.update_bits in UPDATE_BITS, f"update_bits in {UPDATE_BITS}", self.update_bits)

    @classmethod
    def from_message(cls, message: control_pb2.Encoding) -> Self:
        """Validate what a peer sent."""
        return cls(
            _member(Protection, message.protection),
            message.capacity,
            message.clip,
            message.update_bits,
        )

    def to_message(self) -> control_pb2.Encoding:
        """Return the form that travels."""
        return control_pb2.Encoding(
            protection=control_pb2.Protection.ValueType(self.protection),
            capacity=self.capacity,
            clip=self.clip,
            update_bits=self.update_bits,
        )


def _member(kind: type[_E], value: int) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise Refused(Reason.MALFORMED, f"expected a {kind.__name__}, found {value}") from None


def clip_of(encoding: Encoding, terms: LocalTraining, weight_cap: int) -> float:
    """Return the range of an update's values in a cohort whose largest weight is `weight_cap`.

    Without data: Adam moves a value by about its step size per step (Kingma and Ba,
    arXiv:1412.6980v9, section 2.1), and no member takes more steps than the cap implies. Values
    beyond it saturate and are counted.
    """
    if encoding.clip:
        return encoding.clip
    _require(terms.optimizer is Optimizer.ADAMW, "a clip above 0 for SGD, which implies none", 0.0)
    steps = terms.epochs * -(-weight_cap // terms.batch_size)
    return CLIP_MARGIN * terms.learning_rate * steps


def weight_class(samples: int) -> int:
    """Return ceil(log2(samples)): all that an agent tells of its number of samples."""
    if not 1 <= samples <= 1 << MAX_WEIGHT_CLASS:
        raise Refused(
            Reason.WEIGHT_OUT_OF_RANGE, f"expected 1..2^{MAX_WEIGHT_CLASS} samples, found {samples}"
        )
    return (samples - 1).bit_length()
