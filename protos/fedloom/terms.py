"""The terms of a run: what every agent and the coordinator must agree on before anyone trains.

Frozen values with their limits; `from_message` is the border where protobuf forms are validated.
"""

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Self, TypeVar

from fedloom.compression import Compression, compression_problem
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

MAX_EPOCHS = 1_000
MAX_STEPS = 1_000_000  # that terms can ask of a device in a round, other than by epochs
MAX_BATCH_SIZE = 65_536
MAX_CAPACITY = 10_000
MAX_WEIGHT_CLASS = 24  # weights (samples or steps) up to 2^24 per agent and round
UPDATE_BITS = (16, 8)
CLIP_MARGIN = 1.25  # on Adam's movement in a round
ADAPTIVITIES = (1e-9, 1e9)  # whose squares a float32 holds
MAX_GROUPS = 100
FACTOR_NORM_UNIT = 2.0**-16  # weights up to 2^24 stand for norms up to 256
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
    ADAGRAD = 3


class Strategy(IntEnum):
    """Federated algorithm; `fedloom.strategies` has one file for each paper."""

    FED_AVG = 1
    FED_PROX = 2
    FED_AVG_M = 3
    FED_ADAGRAD = 4
    FED_ADAM = 5
    FED_YOGI = 6
    FED_NOVA = 7
    SCAFFOLD = 8
    FED_DYN = 9
    FED_BUFF = 10
    FED_ASYNC = 11
    FED_MA = 12


class LoraRule(IntEnum):
    """Which of an adapter's factors a round trains and sends."""

    FEDIT = 1
    FFA = 2
    ROLORA = 3
    FEDSA = 4
    FLORA = 5
    FLEXLORA = 6
    FEDEX = 7
    HETLORA = 8
    FED_SB = 9


class Personal(IntEnum):
    """What of the model is a device's own."""

    NONE = 1
    FEDPER = 2
    FEDREP = 3
    DITTO = 4


class StalenessWeighting(IntEnum):
    """What an update counts for that was made from an older state."""

    CONSTANT = 1
    POLYNOMIAL = 2
    HINGE = 3


class Weighting(IntEnum):
    """What an agent's update counts for in the mean."""

    SAMPLES = 1
    UNIFORM = 2
    COMPUTE = 3  # steps made
    FACTOR_NORM = 4  # of B A, in units of FACTOR_NORM_UNIT


class GroupRule(IntEnum):
    """What is made of the means of a round's groups."""

    MEDIAN = 1
    TRIMMED_MEAN = 2
    GEOMETRIC_MEDIAN = 3


class Schedule(IntEnum):
    """How a learning rate goes on from its warm-up."""

    CONSTANT = 1
    COSINE = 2


ASYNCHRONOUS = (Strategy.FED_BUFF, Strategy.FED_ASYNC)  # whose rounds wait for no slow agent
# Values that only some strategies have a use for; elsewhere anything but their default is refused.
_FED_OPT = (Strategy.FED_ADAGRAD, Strategy.FED_ADAM, Strategy.FED_YOGI)
STRATEGIES_WITH: dict[str, tuple[Strategy, ...]] = {
    "proximal_mu": (Strategy.FED_PROX, Strategy.FED_ASYNC),
    "server_momentum": (Strategy.FED_AVG_M, *_FED_OPT),
    "server_second_momentum": (Strategy.FED_ADAM, Strategy.FED_YOGI),
    "server_adaptivity": _FED_OPT,
    "dynamic_alpha": (Strategy.FED_DYN,),
    "population": (Strategy.SCAFFOLD, Strategy.FED_DYN),
    "auxiliary_scale": (Strategy.FED_NOVA, Strategy.SCAFFOLD),
    "max_staleness": ASYNCHRONOUS,
    "staleness_exponent": ASYNCHRONOUS,
    "staleness_threshold": ASYNCHRONOUS,
    "mixing": (Strategy.FED_ASYNC,),
}
# What a run file that says nothing means, where a strategy has other defaults than LocalTraining.
_OF_FED_OPT = {"server_learning_rate": 0.01, "server_momentum": 0.9, "server_adaptivity": 1e-3}
_OF_ASYNCHRONOUS = {
    "max_staleness": 10,
    "staleness_weighting": StalenessWeighting.POLYNOMIAL,
    "staleness_exponent": 0.5,
}
STRATEGY_DEFAULTS: dict[Strategy, dict[str, float]] = {
    Strategy.FED_AVG_M: {"server_momentum": 0.9},
    Strategy.FED_ADAGRAD: _OF_FED_OPT,
    Strategy.FED_ADAM: _OF_FED_OPT | {"server_second_momentum": 0.99},
    Strategy.FED_YOGI: _OF_FED_OPT | {"server_second_momentum": 0.99},
    Strategy.FED_DYN: {"dynamic_alpha": 0.1},
    Strategy.FED_BUFF: _OF_ASYNCHRONOUS,
    Strategy.FED_ASYNC: _OF_ASYNCHRONOUS | {"mixing": 0.6},
}
# What a run file that says nothing means, under a LoRA rule of its own defaults.
LORA_DEFAULTS: dict[LoraRule, dict[str, IntEnum]] = {
    LoraRule.HETLORA: {"weighting": Weighting.FACTOR_NORM},
}
# Strategies whose update is a movement alone, to wherever it leads.
_MOVES_ALONE = (Strategy.FED_AVG, Strategy.FED_PROX, Strategy.FED_AVG_M, *_FED_OPT)
_NEEDED = ("server_adaptivity", "dynamic_alpha", "population", "auxiliary_scale", "mixing")
_COUNTS_STEPS = (Strategy.FED_NOVA, Strategy.SCAFFOLD)
_COUNTS_DEVICES = (Strategy.SCAFFOLD, Strategy.FED_DYN)
# Whose server needs every device's factors, and gives new ones in the place of their mean.
NEEDS_FACTORS = (LoraRule.FLORA, LoraRule.FLEXLORA, LoraRule.FEDEX)
_TAKES_MODELS = (Strategy.FED_AVG, Strategy.FED_PROX)
_ENUMS: dict[str, type[IntEnum]] = {
    "strategy": Strategy,
    "optimizer": Optimizer,
    "weighting": Weighting,
    "step_schedule": Schedule,
    "round_schedule": Schedule,
    "lora": LoraRule,
    "personal": Personal,
    "staleness_weighting": StalenessWeighting,
    "compression": Compression,
    "group_rule": GroupRule,
}
# Whose updates are a movement and nothing else, of which any device's may be left out.
MOVEMENTS = (Strategy.FED_AVG, Strategy.FED_PROX, Strategy.FED_AVG_M, *_FED_OPT)


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {what}, found {found}")


def _finite_at_least_zero(name: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, f"{name} to be finite and at least 0", value)


@dataclass(frozen=True)
class LocalTraining:
    """How an agent trains for one round, and what its update means.

    Raises Refused(MALFORMED) when a value is out of range, or of no use to the strategy; what each
    is, control.proto says.
    """

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
    weighting: Weighting = Weighting.SAMPLES
    local_steps: int = 0
    max_steps: int = 0
    gradient_clip: float = 0.0
    step_schedule: Schedule = Schedule.CONSTANT
    warmup_steps: int = 0
    round_schedule: Schedule = Schedule.CONSTANT
    warmup_rounds: int = 0
    server_momentum: float = 0.0
    server_second_momentum: float = 0.0
    server_adaptivity: float = 0.0
    dynamic_alpha: float = 0.0
    population: int = 0
    auxiliary_scale: float = 0.0
    lora: LoraRule = LoraRule.FEDIT
    personal: Personal = Personal.NONE
    head_steps: int = 0
    personal_lambda: float = 0.0
    fine_tune_steps: int = 0
    max_staleness: int = 0
    staleness_weighting: StalenessWeighting = StalenessWeighting.CONSTANT
    staleness_exponent: float = 0.0
    staleness_threshold: int = 0
    mixing: float = 0.0
    compression: Compression = Compression.NONE
    compression_share: float = 0.0
    error_feedback: bool = False
    unbiased: bool = False
    groups: int = 0  # 0: one sum of all
    group_rule: GroupRule = GroupRule.MEDIAN
    group_trim: float = 0.0
    rank_penalty: float = 0.0
    rank_decay: float = 0.0

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_strategy()
        self._check_personal()
        self._check_groups()
        self._check_matching()
        self._check_factors()
        self._check_asynchronous()
        self._check_ranks()
        if problem := compression_problem(self):
            raise Refused(Reason.MALFORMED, problem)

    @property
    def is_asynchronous(self) -> bool:
        """Whether rounds go on without those who still train, and take their updates later."""
        return self.strategy in ASYNCHRONOUS

    @property
    def sends_labels(self) -> bool:
        """Whether an update says how many of the agent's rows are of each label."""
        return self.strategy is Strategy.FED_MA

    def _check_ranges(self) -> None:
        for name, least, most in (
            ("epochs", 1, MAX_EPOCHS),
            ("batch_size", 1, MAX_BATCH_SIZE),
            ("local_steps", 0, MAX_STEPS),
            ("max_steps", 0, MAX_STEPS),
            ("warmup_steps", 0, MAX_STEPS),
            ("warmup_rounds", 0, MAX_STEPS),
            ("population", 0, 2**32 - 1),
            ("head_steps", 0, MAX_STEPS),
            ("fine_tune_steps", 0, MAX_STEPS),
            ("max_staleness", 0, MAX_STEPS),
            ("staleness_threshold", 0, MAX_STEPS),
        ):
            value = getattr(self, name)
            _require(least <= value <= most, f"{name} in {least}..{most}", value)
        for field in fields(self):
            if field.type is float:
                _finite_at_least_zero(field.name, getattr(self, field.name))
        _require(self.learning_rate > 0, "learning_rate above 0", self.learning_rate)
        for name in ("momentum", "server_momentum", "server_second_momentum"):
            _require(getattr(self, name) < 1, f"{name} in [0, 1)", getattr(self, name))
        _require(0 <= self.seed < 2**64, "seed in 0..2^64-1", self.seed)
        _require(
            self.local_steps == 0 or (self.epochs == 1 and self.max_steps == 0),
            "local_steps without epochs or max_steps, which say the same in another way",
            (self.local_steps, self.epochs, self.max_steps),
        )

    def _check_strategy(self) -> None:
        for name, strategies in STRATEGIES_WITH.items():
            value, told = getattr(self, name), " or ".join(one.name for one in strategies)
            if self.strategy not in strategies:
                _require(value == 0, f"{name} 0 unless the strategy is {told}", value)
            elif name in _NEEDED:
                _require(value > 0, f"{name} above 0 with {self.strategy.name}", value)
        if self.server_adaptivity:
            least, most = ADAPTIVITIES
            fits = least <= self.server_adaptivity <= most
            _require(fits, f"server_adaptivity in {least}..{most}", self.server_adaptivity)
        _require(
            self.optimizer is Optimizer.SGD or self.strategy not in _COUNTS_STEPS,
            f"optimizer SGD with {self.strategy.name}, which divides a movement by the steps that "
            "made it (FED_DYN corrects drift under every optimizer)",
            self.optimizer.name,
        )
        _require(
            self.weighting is Weighting.UNIFORM or self.strategy not in _COUNTS_DEVICES,
            f"weighting UNIFORM with {self.strategy.name}, whose server counts devices",
            self.weighting.name,
        )
        _require(
            self.server_learning_rate == 1 or self.strategy is not Strategy.FED_DYN,
            "server_learning_rate 1 with FED_DYN, whose server has no rate",
            self.server_learning_rate,
        )

    def _check_matching(self) -> None:
        if self.strategy is not Strategy.FED_MA:
            return
        whole = self.lora is LoraRule.FEDIT and self.personal is Personal.NONE
        wanted = "lora FEDIT and personal NONE with FED_MA, which matches whole layers"
        _require(whole, wanted, (self.lora.name, self.personal.name))
        _require(
            self.server_learning_rate == 1,
            "server_learning_rate 1 with FED_MA, whose server takes weights over",
            self.server_learning_rate,
        )

    def _check_personal(self) -> None:
        for name, personal in (
            ("head_steps", Personal.FEDREP),
            ("personal_lambda", Personal.DITTO),
        ):
            value = getattr(self, name)
            if self.personal is personal:
                _require(value > 0, f"{name} above 0 with {personal.name}", value)
            else:
                _require(value == 0, f"{name} 0 unless personal is {personal.name}", value)
        _require(
            self.personal is not Personal.DITTO or self.lora is not LoraRule.FEDSA,
            "personal NONE, FEDPER or FEDREP with lora FEDSA, which keeps B on the device already "
            "(lora FFA goes with DITTO)",
            self.personal.name,
        )

    def _check_asynchronous(self) -> None:
        weighting = self.staleness_weighting
        is_hinge = weighting is StalenessWeighting.HINGE
        has_exponent = weighting is not StalenessWeighting.CONSTANT
        _require(
            self.is_asynchronous or not has_exponent,
            "staleness_weighting CONSTANT unless the strategy is FED_BUFF or FED_ASYNC",
            weighting.name,
        )
        _require(
            (self.staleness_exponent > 0) == has_exponent,
            "staleness_exponent above 0 with POLYNOMIAL and HINGE, and 0 otherwise",
            self.staleness_exponent,
        )
        _require(
            is_hinge or self.staleness_threshold == 0,
            "staleness_threshold 0 unless staleness_weighting is HINGE",
            self.staleness_threshold,
        )
        if not self.is_asynchronous:
            return
        _require(
            self.mixing <= 1 and (not self.mixing or self.server_learning_rate == 1),
            "mixing of at most 1, and server_learning_rate 1 beside it",
            (self.mixing, self.server_learning_rate),
        )
        _require(
            self.personal is Personal.NONE and self.lora in (LoraRule.FEDIT, LoraRule.FFA),
            f"personal NONE and lora FEDIT or FFA with {self.strategy.name}: an update from an "
            "older state must hold the same parts, and what is a device's own must belong to that "
            "state (FED_AVG goes with them)",
            (self.personal.name, self.lora.name),
        )

    def _check_groups(self) -> None:
        wanted = f"groups 0 or 3..{MAX_GROUPS}: of two, a rule cannot tell which is right"
        _require(self.groups == 0 or 3 <= self.groups <= MAX_GROUPS, wanted, self.groups)
        movement = self.strategy in MOVEMENTS
        _require(movement or not self.groups, "groups 0 with this strategy", self.groups)
        means = self.lora not in (*NEEDS_FACTORS, LoraRule.HETLORA)
        _require(means or not self.groups, f"groups 0 with lora {self.lora.name}", self.groups)
        if self.groups and self.group_rule is GroupRule.TRIMMED_MEAN:
            fits = self.group_trim * self.groups >= 1 and self.group_trim < 0.5
            _require(fits, "group_trim in [1/groups, 0.5), which cuts one", self.group_trim)
        else:
            _require(self.group_trim == 0, "group_trim 0 without TRIMMED_MEAN", self.group_trim)

    def _check_factors(self) -> None:
        if self.lora not in NEEDS_FACTORS:
            return
        name = self.lora.name
        _require(
            self.strategy in _TAKES_MODELS and self.server_learning_rate == 1,
            f"strategy FED_AVG or FED_PROX and server_learning_rate 1 with lora {name}, whose "
            "server gives new factors, no movement to be scaled or remembered (every strategy goes "
            "with lora FFA, whose mean of products is exact as well)",
            f"{self.strategy.name} and {self.server_learning_rate:g}",
        )
        _require(
            self.personal is not Personal.DITTO,
            f"personal NONE, FEDPER or FEDREP with lora {name}, whose factors a round replaces: "
            "no model of one's own is near them (lora FFA goes with DITTO)",
            self.personal.name,
        )

    def _check_ranks(self) -> None:
        _require(
            (self.rank_penalty > 0) == (self.rank_decay > 0),
            "rank_penalty and rank_decay both above 0, or neither",
            (self.rank_penalty, self.rank_decay),
        )
        _require(self.rank_decay < 1, "rank_decay in [0, 1)", self.rank_decay)
        if self.lora is not LoraRule.HETLORA:
            _require(self.rank_decay == 0, "rank_decay 0 unless lora is HETLORA", self.rank_decay)
            _require(
                self.weighting is not Weighting.FACTOR_NORM,
                "weighting SAMPLES, UNIFORM or COMPUTE unless lora is HETLORA",
                self.weighting.name,
            )
            return
        _require(
            self.strategy in _MOVES_ALONE,
            "a strategy that sends a movement alone with lora HETLORA, such as FED_AVG: beyond a "
            "device's rank it is no sum of gradients",
            self.strategy.name,
        )
        _require(
            self.personal is Personal.NONE,
            "personal NONE with lora HETLORA (lora FEDIT goes with it, at one rank)",
            self.personal.name,
        )

    @classmethod
    def from_message(cls, message: control_pb2.LocalTraining) -> Self:
        """Validate what a peer sent."""
        values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(cls)}
        for name, kind in _ENUMS.items():
            absent = values[name] == 0 and name not in ("strategy", "optimizer")
            values[name] = kind(1) if absent else _member(kind, values[name])
        return cls(**values)

    def to_message(self) -> control_pb2.LocalTraining:
        """Return the form that travels."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return control_pb2.LocalTraining(**values)


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


def steps_of(terms: LocalTraining, samples: int) -> int:
    """Return how many optimiser steps a device with so many samples makes in a round."""
    if terms.local_steps:
        return terms.local_steps
    steps = terms.epochs * -(-samples // terms.batch_size)
    return min(steps, terms.max_steps) if terms.max_steps else steps


def weight_of(terms: LocalTraining, samples: int, factor_norm: float = 0.0) -> int:
    """Return what the update of a device with so many samples counts for.

    `factor_norm`: Frobenius norm of its products B A, for HETLORA.
    """
    match terms.weighting:
        case Weighting.SAMPLES:
            return samples
        case Weighting.UNIFORM:
            return 1
        case Weighting.COMPUTE:
            return steps_of(terms, samples)
        case Weighting.FACTOR_NORM:
            return min(max(round(factor_norm / FACTOR_NORM_UNIT), 1), 1 << MAX_WEIGHT_CLASS)


def most_steps(terms: LocalTraining, weight_cap: int) -> int:
    """Return how many steps no member of a cohort exceeds whose largest weight is `weight_cap`.

    0 where nothing says it: uniform weights and norms tell nothing of a device's samples.
    """
    match terms.weighting:
        case Weighting.SAMPLES:
            return steps_of(terms, weight_cap)
        case Weighting.COMPUTE:
            steps = terms.local_steps or terms.max_steps
            return min(steps, weight_cap) if steps else weight_cap
        case Weighting.UNIFORM | Weighting.FACTOR_NORM:
            return terms.local_steps or terms.max_steps


def implies_clip(terms: LocalTraining) -> bool:
    """Tell whether the range of an update's values follows from the terms."""
    to_zero = terms.lora is LoraRule.HETLORA  # a device of a small rank, however long it trains
    return terms.optimizer is not Optimizer.SGD and not to_zero and most_steps(terms, 1) > 0


def clip_of(encoding: Encoding, terms: LocalTraining, weight_cap: int) -> float:
    """Return the range of an update's values in a cohort whose largest weight is `weight_cap`.

    Without data: Adam moves a value by about its step size per step (Kingma and Ba,
    arXiv:1412.6980v9, section 2.1), Adagrad by no more than that, schedules only shorten it, and no
    member takes more steps than `most_steps`. Values beyond it saturate and are counted.
    """
    if encoding.clip:
        return encoding.clip
    _require(
        implies_clip(terms),
        "a clip above 0 where the terms imply none (SGD; HETLORA; uniform weights without "
        "local_steps or max_steps)",
        0.0,
    )
    return CLIP_MARGIN * terms.learning_rate * most_steps(terms, weight_cap)


def weight_class(weight: int) -> int:
    """Return ceil(log2(weight)): all that an agent tells of its number of samples or steps."""
    if not 1 <= weight <= 1 << MAX_WEIGHT_CLASS:
        raise Refused(
            Reason.WEIGHT_OUT_OF_RANGE,
            f"expected a weight of 1..2^{MAX_WEIGHT_CLASS}, found {weight}",
        )
    return (weight - 1).bit_length()
