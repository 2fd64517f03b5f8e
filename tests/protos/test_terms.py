"""The terms of a run: within their limits they travel unchanged, outside they are refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compression import LARGEST_TOP_SHARE, Compression
from fedloom.errors import Reason, Refused
from fedloom.strategies.ditto import personal_terms
from fedloom.strategies.fine_tuning import fine_tuning_terms
from fedloom.terms import (
    ADAPTIVITIES,
    ASYNCHRONOUS,
    MAX_BATCH_SIZE,
    MAX_CAPACITY,
    MAX_EPOCHS,
    MAX_STEPS,
    MAX_WEIGHT_CLASS,
    MOVEMENTS,
    NEEDS_FACTORS,
    STRATEGIES_WITH,
    UPDATE_BITS,
    Encoding,
    GroupRule,
    LocalTraining,
    LoraRule,
    Optimizer,
    Personal,
    Protection,
    Schedule,
    StalenessWeighting,
    Strategy,
    Weighting,
    clip_of,
    steps_of,
    weight_class,
    weight_of,
)
from fedloom.v1 import control_pb2
from tests.strategies.samples import ALL_TERMS, NEEDED, terms_of

_weightings = st.sampled_from([Weighting.SAMPLES, Weighting.UNIFORM, Weighting.COMPUTE])
_rate = st.floats(0, 1e6, allow_nan=False)
_below_one = st.floats(0, 1, exclude_max=True)
_steps = st.integers(0, MAX_STEPS)
_amounts = st.fixed_dictionaries(
    {"epochs": st.integers(1, MAX_EPOCHS), "max_steps": _steps}
) | st.fixed_dictionaries({"local_steps": _steps})
_RULES = [  # which take any strategy
    rule for rule in LoraRule if rule not in (*NEEDS_FACTORS, LoraRule.HETLORA)
]
_any_lora = st.sampled_from(_RULES)
_HETLORA = {"lora": LoraRule.HETLORA, "rank_penalty": 0.5, "rank_decay": 0.75}
_what_travels = (
    st.fixed_dictionaries(
        {"lora": _any_lora, "personal": st.sampled_from([Personal.NONE, Personal.FEDPER])},
        optional={"fine_tune_steps": _steps},
    )
    | st.fixed_dictionaries(
        {
            "lora": _any_lora,
            "personal": st.just(Personal.FEDREP),
            "head_steps": st.integers(1, MAX_STEPS),
        }
    )
    | st.fixed_dictionaries(
        {
            "lora": st.sampled_from([rule for rule in _RULES if rule is not LoraRule.FEDSA]),
            "personal": st.just(Personal.DITTO),
            "personal_lambda": st.floats(0, 1e6, exclude_min=True),
        },
        optional={"fine_tune_steps": _steps},
    )
)
_what_every_sum_takes = st.fixed_dictionaries(
    {"lora": st.sampled_from([LoraRule.FEDIT, LoraRule.FFA])}, optional={"fine_tune_steps": _steps}
)
_OF_STRATEGIES: dict[str, st.SearchStrategy[float]] = {
    "proximal_mu": _rate,
    "server_momentum": _below_one,
    "server_second_momentum": _below_one,
    "server_adaptivity": st.floats(*ADAPTIVITIES),
    "dynamic_alpha": st.floats(0, 1e6, exclude_min=True),
    "population": st.integers(1, 2**32 - 1),
    "auxiliary_scale": st.floats(0, 1e6, exclude_min=True),
    "max_staleness": st.integers(0, MAX_STEPS),
    "staleness_exponent": st.floats(0, 1e6, exclude_min=True),
    "staleness_threshold": st.integers(0, MAX_STEPS),
    "mixing": st.floats(0, 1, exclude_min=True),
}

_share = st.floats(0, LARGEST_TOP_SHARE, exclude_min=True)
_compressions = st.sampled_from([{}, {"compression": Compression.QUANTISED}]) | st.builds(
    lambda kind, share, more: {"compression": kind, "compression_share": share, **more},
    st.sampled_from([Compression.RANDOM_MASK, Compression.TOP_K]),
    _share,
    st.sampled_from([{}, {"error_feedback": True}]),
)
_unbiased = st.builds(
    lambda share: {"compression_share": share, "unbiased": True},
    st.floats(0, 1, exclude_min=True, exclude_max=True),
).map(lambda values: values | {"compression": Compression.RANDOM_MASK})


_groups = st.sampled_from(
    [
        {},
        {"groups": 3},
        {"groups": 100, "group_rule": GroupRule.GEOMETRIC_MEDIAN},
        {"groups": 7, "group_rule": GroupRule.TRIMMED_MEAN, "group_trim": 0.3},
    ]
)


@st.composite
def trainings(draw: st.DrawFn) -> LocalTraining:
    """Any terms of local training within the limits."""
    strategy = draw(st.sampled_from(Strategy))
    values: dict[str, Any] = {
        "optimizer": draw(st.sampled_from(Optimizer)),
        "batch_size": draw(st.integers(1, MAX_BATCH_SIZE)),
        "learning_rate": draw(st.floats(0, 1e6, exclude_min=True)),
        "weight_decay": draw(_rate),
        "momentum": draw(_below_one),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "weighting": draw(_weightings),
        "gradient_clip": draw(_rate),
        "step_schedule": draw(st.sampled_from(Schedule)),
        "warmup_steps": draw(st.integers(0, MAX_STEPS)),
        "round_schedule": draw(st.sampled_from(Schedule)),
        "warmup_rounds": draw(st.integers(0, MAX_STEPS)),
        **draw(_amounts),
    }
    if strategy is not Strategy.FED_MA:
        values |= draw(_what_every_sum_takes if strategy in ASYNCHRONOUS else _what_travels)
    if strategy in MOVEMENTS:
        values |= draw(_groups)
    if strategy not in (Strategy.FED_DYN, Strategy.FED_MA, Strategy.FED_ASYNC):
        values["server_learning_rate"] = draw(_rate)
    if strategy in ASYNCHRONOUS:  # of which the threshold is the hinge's alone
        values["staleness_weighting"] = StalenessWeighting.HINGE
    for name, strategies in STRATEGIES_WITH.items():
        if strategy in strategies:
            values[name] = draw(_OF_STRATEGIES[name])
    if draw(st.booleans()) and values.get("personal", Personal.NONE) is Personal.NONE:
        values |= _HETLORA | {"weighting": draw(st.sampled_from(Weighting))}
        values = {name: value for name, value in values.items() if name not in STRATEGIES_WITH}
        others = ("group", "staleness")
        values = {name: value for name, value in values.items() if not name.startswith(others)}
        strategy = Strategy.FED_AVG
    elif strategy in MOVEMENTS:
        values |= draw(_compressions | _unbiased)
    return terms_of(strategy, **(values | NEEDED.get(strategy, {})))


encodings = st.builds(
    Encoding,
    protection=st.sampled_from(Protection),
    capacity=st.integers(1, MAX_CAPACITY),
    clip=st.floats(0, 1e6),
    update_bits=st.sampled_from(UPDATE_BITS),
)


@given(trainings())
def test_training_travels_unchanged(training: LocalTraining) -> None:
    data = training.to_message().SerializeToString()
    assert LocalTraining.from_message(control_pb2.LocalTraining.FromString(data)) == training


@given(trainings())
def test_what_a_device_trains_for_itself_has_terms_that_are_in_the_limits(
    training: LocalTraining,
) -> None:
    if training.personal is Personal.DITTO:
        beside = personal_terms(training)
        assert beside.proximal_mu == training.personal_lambda
        assert steps_of(beside, 100) == steps_of(training, 100)
    if training.fine_tune_steps:
        alone = fine_tuning_terms(training)
        assert steps_of(alone, 100) == training.fine_tune_steps
        assert (alone.optimizer, alone.lora) == (training.optimizer, training.lora)


@given(encodings)
def test_encoding_travels_unchanged(encoding: Encoding) -> None:
    data = encoding.to_message().SerializeToString()
    assert Encoding.from_message(control_pb2.Encoding.FromString(data)) == encoding


OUTSIDE_TRAINING = [
    ("epochs", 0),
    ("epochs", MAX_EPOCHS + 1),
    ("batch_size", 0),
    ("batch_size", MAX_BATCH_SIZE + 1),
    ("learning_rate", 0.0),
    *(
        (name, value)
        for name in (
            "learning_rate",
            "weight_decay",
            "momentum",
            "proximal_mu",
            "server_learning_rate",
            "gradient_clip",
        )
        for value in (-1e-9, math.nan, math.inf)
    ),
    ("momentum", 1.0),
    ("strategy", 0),
    ("strategy", 99),
    ("optimizer", 0),
    ("optimizer", 99),
    ("weighting", 99),
    ("step_schedule", 99),
    ("round_schedule", 99),
    ("lora", 99),
    ("personal", 99),
    ("personal", Personal.DITTO),
    ("head_steps", 1),
    ("personal_lambda", 0.5),
    ("personal_lambda", math.nan),
    ("rank_penalty", 0.5),
    ("rank_decay", 0.5),
    ("weighting", Weighting.FACTOR_NORM),
    ("fine_tune_steps", MAX_STEPS + 1),
    *((name, MAX_STEPS + 1) for name in ("local_steps", "max_steps")),
    *((name, MAX_STEPS + 1) for name in ("warmup_steps", "warmup_rounds")),
]


@pytest.mark.parametrize(("field", "value"), OUTSIDE_TRAINING)
def test_training_outside_the_limits_is_refused(field: str, value: float) -> None:
    message = LocalTraining(strategy=Strategy.FED_PROX).to_message()
    assert LocalTraining.from_message(message)
    setattr(message, field, value)
    with pytest.raises(Refused) as caught:
        LocalTraining.from_message(message)
    assert caught.value.reason is Reason.MALFORMED


def test_a_proximal_term_needs_fedprox() -> None:
    assert LocalTraining(strategy=Strategy.FED_PROX, proximal_mu=0.1).proximal_mu == 0.1
    with pytest.raises(Refused, match="proximal_mu 0"):
        LocalTraining(strategy=Strategy.FED_AVG, proximal_mu=0.1)


@pytest.mark.parametrize("name", STRATEGIES_WITH)
@pytest.mark.parametrize("terms", ALL_TERMS, ids=lambda terms: terms.strategy.name)
def test_a_value_is_for_the_strategies_that_have_a_use_for_it(
    name: str, terms: LocalTraining
) -> None:
    value = 2 if name in ("population", "max_staleness", "staleness_threshold") else 0.5
    if terms.is_asynchronous:
        terms = replace(terms, staleness_weighting=StalenessWeighting.HINGE)
    if terms.strategy in STRATEGIES_WITH[name]:
        assert getattr(replace(terms, **{name: value}), name) == value
    else:
        with pytest.raises(Refused, match=f"{name} 0 unless the strategy is"):
            replace(terms, **{name: value})


@pytest.mark.parametrize(
    ("strategy", "change", "nearest"),
    [
        (Strategy.SCAFFOLD, {"optimizer": Optimizer.ADAMW}, "SGD with SCAFFOLD.*FED_DYN"),
        (Strategy.FED_NOVA, {"optimizer": Optimizer.ADAGRAD}, "SGD with FED_NOVA.*FED_DYN"),
        (Strategy.SCAFFOLD, {"weighting": Weighting.SAMPLES}, "UNIFORM with SCAFFOLD"),
        (Strategy.FED_DYN, {"weighting": Weighting.COMPUTE}, "UNIFORM with FED_DYN"),
        (Strategy.FED_DYN, {"server_learning_rate": 0.5}, "server_learning_rate 1 with FED_DYN"),
        (Strategy.FED_DYN, {"dynamic_alpha": 0.0}, "dynamic_alpha above 0"),
        (Strategy.SCAFFOLD, {"population": 0}, "population above 0"),
        (Strategy.FED_NOVA, {"auxiliary_scale": 0.0}, "auxiliary_scale above 0"),
        (Strategy.FED_ADAM, {"server_adaptivity": 1e-10}, "server_adaptivity in"),
        (Strategy.FED_AVG, {"local_steps": 5, "epochs": 2}, "local_steps without epochs"),
        (Strategy.FED_AVG, {"local_steps": 5, "max_steps": 2}, "local_steps without epochs"),
        (Strategy.FED_ASYNC, {"mixing": 1.5}, "mixing of at most 1"),
        (Strategy.FED_ASYNC, {"mixing": 0.0}, "mixing above 0"),
        (Strategy.FED_ASYNC, {"server_learning_rate": 0.5}, "server_learning_rate 1"),
        (Strategy.FED_BUFF, {"staleness_threshold": 1}, "unless staleness_weighting is HINGE"),
        (Strategy.FED_BUFF, {"staleness_exponent": 0.0}, "staleness_exponent above 0"),
        (Strategy.FED_BUFF, {"lora": LoraRule.ROLORA}, r"FEDIT or FFA.*FED_AVG goes"),
        (Strategy.FED_BUFF, {"personal": Personal.FEDPER}, r"personal NONE.*FED_AVG goes"),
        (
            Strategy.FED_AVG,
            {"staleness_weighting": StalenessWeighting.POLYNOMIAL, "staleness_exponent": 0.5},
            "FED_BUFF",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(
    strategy: Strategy, change: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(Refused, match=nearest):
        terms_of(strategy, **change)


def test_an_older_message_has_the_older_meaning() -> None:
    message = LocalTraining().to_message()
    for name in ("weighting", "step_schedule", "round_schedule"):
        message.ClearField(name)
    assert LocalTraining.from_message(message) == LocalTraining()


@given(trainings(), st.integers(1, 2**MAX_WEIGHT_CLASS))
def test_a_devices_steps_follow_from_its_samples(training: LocalTraining, samples: int) -> None:
    steps = steps_of(training, samples)
    if training.local_steps:
        assert steps == training.local_steps
    else:
        by_epochs = training.epochs * math.ceil(samples / training.batch_size)
        assert steps == min(by_epochs, training.max_steps or by_epochs)
    expected = {Weighting.SAMPLES: samples, Weighting.UNIFORM: 1, Weighting.COMPUTE: steps}
    expected[Weighting.FACTOR_NORM] = 1  # of a norm that is not known yet
    assert weight_of(training, samples) == expected[training.weighting]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_is_64_bits(seed: int) -> None:
    with pytest.raises(Refused, match="seed"):
        LocalTraining(seed=seed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protection", 0),
        ("protection", 99),
        ("capacity", 0),
        ("capacity", MAX_CAPACITY + 1),
        ("clip", -1.0),
        ("clip", math.nan),
        ("clip", math.inf),
        ("update_bits", 0),
        ("update_bits", 15),
    ],
)
def test_encoding_outside_the_limits_is_refused(field: str, value: float) -> None:
    message = Encoding(Protection.ENCRYPTED).to_message()
    assert Encoding.from_message(message)
    setattr(message, field, value)
    with pytest.raises(Refused) as caught:
        Encoding.from_message(message)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "empty",
    [
        lambda: LocalTraining.from_message(control_pb2.LocalTraining()),
        lambda: Encoding.from_message(control_pb2.Encoding()),
    ],
    ids=["training", "encoding"],
)
def test_a_message_left_empty_is_refused(empty: Callable[[], object]) -> None:
    with pytest.raises(Refused):
        empty()


@given(encodings, trainings(), st.integers(1, 2**MAX_WEIGHT_CLASS))
def test_a_clip_that_is_not_stated_follows_from_the_terms(
    encoding: Encoding, training: LocalTraining, weight_cap: int
) -> None:
    """No member whose weight is within the cap makes more steps than the clip is for."""
    bounds = [training.local_steps or training.max_steps]
    if training.weighting is Weighting.SAMPLES and not training.local_steps:
        bounds.append(training.epochs * math.ceil(weight_cap / training.batch_size))
    if training.weighting is Weighting.COMPUTE:
        bounds.append(weight_cap)
    steps = min((bound for bound in bounds if bound), default=0)
    unstated = replace(encoding, clip=0.0)
    to_zero = training.lora is LoraRule.HETLORA
    if training.optimizer is not Optimizer.SGD and steps and not to_zero:
        assert clip_of(unstated, training, weight_cap) == 1.25 * training.learning_rate * steps
    else:
        with pytest.raises(Refused, match="MALFORMED"):
            clip_of(unstated, training, weight_cap)
    stated = replace(encoding, clip=0.5)
    assert clip_of(stated, training, weight_cap) == 0.5


@given(st.integers(1, 2**MAX_WEIGHT_CLASS) | st.sampled_from([2**c for c in range(25)]))
def test_a_weight_class_is_the_smallest_power_of_two_that_holds_the_samples(samples: int) -> None:
    found = weight_class(samples)
    assert 0 <= found <= MAX_WEIGHT_CLASS
    assert 2.0 ** (found - 1) < samples <= 2**found


@pytest.mark.parametrize("samples", [-1, 0, 2**MAX_WEIGHT_CLASS + 1])
def test_no_samples_and_too_many_are_refused(samples: int) -> None:
    with pytest.raises(Refused) as caught:
        weight_class(samples)
    assert caught.value.reason is Reason.WEIGHT_OUT_OF_RANGE
