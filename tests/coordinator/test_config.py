"""`run.toml`: a good file becomes frozen values; of a bad one every problem is named at once."""

import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import crypto
from coordinator.aggregation import Aggregation, Rule
from coordinator.config import (
    CohortTerms,
    Deadlines,
    RunConfig,
    load_run_config,
    parse_run_config,
)
from coordinator.plateau import PlateauRule
from fedloom.errors import ConfigError
from fedloom.gates import ActivationGate
from fedloom.quality import EvaluationTerms, Metric, Report
from fedloom.schedules import effective_steps
from fedloom.terms import (
    MAX_WEIGHT_CLASS,
    GroupRule,
    LocalTraining,
    LoraRule,
    Optimizer,
    Personal,
    Protection,
    StalenessWeighting,
    Strategy,
    Weighting,
    clip_of,
)

PATH = Path("/runs/intent.toml")
LEAST = {"plan": "plans/intent", "rounds": 5}
GOOD = """
name = "intent"
plan = "plans/intent"
rounds = 5
[cohort]
minimum = 3
size = 50
[training]
strategy = "fed_prox"
optimizer = "sgd"
epochs = 2
batch_size = 8
learning_rate = 1
momentum = 0.9
proximal_mu = 0.1
seed = 11
[protection]
kind = "encrypted"
update_bits = 8
clip = 0.05
[deadlines]
training = 60
"""


def problems(**changes: Any) -> str:
    """Return what is wrong with the least file after the changes."""
    with pytest.raises(ConfigError) as caught:
        parse_run_config(LEAST | changes, PATH)
    assert caught.value.where == str(PATH)
    return caught.value.problem


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    config = load_run_config(path)
    assert (config.name, config.rounds, config.cohort) == ("intent", 5, CohortTerms(3, 50))
    assert config.plan == tmp_path.resolve() / "plans" / "intent"
    assert config.training == LocalTraining(
        strategy=Strategy.FED_PROX,
        optimizer=Optimizer.SGD,
        epochs=2,
        batch_size=8,
        learning_rate=1.0,
        momentum=0.9,
        proximal_mu=0.1,
        seed=11,
    )
    assert config.encoding.protection is Protection.ENCRYPTED
    assert (config.encoding.clip, config.encoding.update_bits) == (0.05, 8)
    assert config.encoding.capacity == 50
    assert config.deadlines == Deadlines(training=60.0)


def test_what_is_not_stated_has_a_default() -> None:
    config = parse_run_config(LEAST, PATH)
    assert config.name == "intent"
    assert config.training == LocalTraining()
    assert config.encoding.protection is Protection.SEALED  # never less by omission
    assert (config.cohort, config.deadlines) == (CohortTerms(), Deadlines())
    assert parse_run_config(LEAST | {"cohort": {}, "deadlines": {}}, PATH) == config
    assert parse_run_config(LEAST | {"plan": "/abs/plan"}, PATH).plan == Path("/abs/plan")


def test_every_problem_is_named_at_once() -> None:
    found = problems(
        rounds=0,
        plan="",
        colour="red",
        cohort={"minimum": 5, "size": 2, "maximum": 1},
        training={"strategy": "fed_sgd", "epochs": "two", "optimizer": "sgd"},
        protection={"kind": "rot13"},
        deadlines={"training": -1},
    )
    for key in (
        "rounds",
        "plan",
        "colour",
        "cohort",
        "cohort.maximum",
        "training.strategy",
        "training.epochs",
        "protection.kind",
        "protection.clip",
        "deadlines",
    ):
        assert f"{key}: " in found, found


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"cohort": {"colour": 1}},
        {"cohort": 5},
        {"colour": {}},
        {"training": {"colour": {}}},
        {"training": {"optimizer": {"name": "sgd"}}},
    ],
    ids=str,
)
def test_an_unknown_key_is_an_error(change: dict[str, Any]) -> None:
    assert "unknown key; known are" in problems(**change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rounds": True}, "rounds: expected int, found True"),
        ({"rounds": 5.0}, "rounds: expected int, found 5.0"),
        ({"rounds": "5"}, "rounds: expected int, found '5'"),
        ({"rounds": {}}, "rounds: expected int, found {}"),
        ({"name": 1}, "name: expected str, found 1"),
        ({"plan": ["p"]}, "plan: expected str, found ['p']"),
        ({"deadlines": {"upload": False}}, "deadlines.upload: expected float, found False"),
        ({"training": {"learning_rate": "1e-3"}}, "training.learning_rate: expected float"),
        ({"training": {"learning_rate": 10**400}}, "training.learning_rate: expected float"),
        ({"training": {"strategy": 1}}, "training.strategy: expected str, found 1"),
    ],
    ids=str,
)
def test_a_wrong_type_is_an_error(change: dict[str, Any], expected: str) -> None:
    assert expected in problems(**change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rounds": 0}, "rounds: expected 1..100000"),
        ({"rounds": 100_001}, "rounds: expected 1..100000"),
        ({"name": "a\0b"}, "name: expected"),
        ({"plan": ""}, "plan: expected"),
        ({"plan": "a\0b"}, "plan: expected"),
        ({"cohort": {"minimum": 0}}, "cohort: expected 1 <= minimum"),
        ({"cohort": {"minimum": 3, "size": 2}}, "minimum <= size"),
        ({"cohort": {"size": 10_001}}, "capacity in 1..10000"),
        ({"training": {"learning_rate": 0}}, "learning_rate above 0"),
        ({"training": {"epochs": 0}}, "epochs in 1.."),
        ({"training": {"momentum": 1.0}}, "momentum in [0, 1)"),
        ({"training": {"seed": -1}}, "seed in 0.."),
        ({"training": {"strategy": "FED_AVG"}}, "expected one of ['fed_adagrad',"),
        ({"protection": {"update_bits": 12}}, "update_bits in (16, 8)"),
        ({"protection": {"clip": float("nan")}}, "clip to be finite"),
        ({"deadlines": {"upload": 0}}, "deadlines: expected seconds above 0"),
        ({"deadlines": {"training": float("inf")}}, "deadlines: expected seconds above 0"),
        ({"deadlines": {"training": float("nan")}}, "deadlines: expected seconds above 0"),
        ({"deadlines": {"training": 1e300}}, "31622400 at most"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_an_error(change: dict[str, Any], expected: str) -> None:
    assert expected in problems(**change)


def test_a_gate_is_open_unless_it_is_stated() -> None:
    assert parse_run_config(LEAST, PATH).gate.is_open
    bounds = {"minimum_accuracy": 0.8, "maximum_loss_rise": 0}
    gate = parse_run_config(LEAST | {"activation": bounds}, PATH).gate
    assert gate == ActivationGate(minimum_accuracy=0.8, maximum_loss_rise=0.0)
    gate = parse_run_config(LEAST | {"activation": {"maximum_perplexity": 20}}, PATH).gate
    assert gate.maximum_loss == pytest.approx(math.log(20))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"minimum_accuracy": 80}, "activation.minimum_accuracy in 0..1"),
        ({"maximum_loss": float("nan")}, "activation.maximum_loss finite"),
        ({"maximum_perplexity": 0.5}, "expected at least 1"),
        ({"maximum_perplexity": 20, "maximum_loss": 3}, "no maximum_loss beside it"),
        ({"maximum_perplexity": float("nan")}, "expected at least 1"),
        ({"accuracy": 0.8}, "activation.accuracy: unknown key"),
        ({"minimum_accuracy": "high"}, "activation.minimum_accuracy: expected float"),
    ],
)
def test_a_gate_that_means_nothing_is_an_error(bounds: dict[str, Any], expected: str) -> None:
    assert expected in problems(activation=bounds)


@pytest.mark.parametrize(
    ("kind", "stated", "report"),
    [
        ("sealed", {}, Report.MEAN),
        ("masked", {}, Report.MEAN),
        ("plain", {}, Report.EACH),
        ("plain", {"patience": 3}, Report.MEAN),  # a plateau is one of means
        ("plain", {"report": "mean"}, Report.MEAN),
        ("sealed", {"report": "each"}, Report.EACH),
        ("sealed", {"report": "none"}, Report.NONE),
    ],
)
def test_quality_is_summed_unless_every_update_is_readable(
    kind: str, stated: dict[str, Any], report: Report
) -> None:
    file = LEAST | {"protection": {"kind": kind}, "evaluation": stated}
    assert parse_run_config(file, PATH).evaluation == EvaluationTerms(report)


def test_what_ends_a_run_early() -> None:
    stated = {"patience": 3, "metric": "macro_f1", "minimum_delta": 0.01, "loss_bound": 8}
    config = parse_run_config(LEAST | {"evaluation": stated}, PATH)
    assert config.policy.plateau == PlateauRule(3, Metric.MACRO_F1, 0.01)
    assert config.evaluation == EvaluationTerms(loss_bound=8.0)
    assert parse_run_config(LEAST, PATH).policy.plateau.patience == 0


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"patience": -1}, "evaluation.patience: expected 0 or more"),
        ({"patience": 1, "tell": False}, 'expected report = "mean" and tell = true'),
        ({"patience": 1, "report": "each"}, 'expected report = "mean" and tell = true'),
        ({"metric": "f1"}, "evaluation.metric: expected one of"),
        ({"minimum_delta": float("nan")}, "evaluation.minimum_delta: expected 0 or more"),
        ({"loss_bound": -1}, "loss_bound in 0.."),
        ({"report": "all"}, "evaluation.report: expected one of"),
        ({"reports": "mean"}, "evaluation.reports: unknown key"),
    ],
)
def test_an_evaluation_that_cannot_be_is_an_error(stated: dict[str, Any], expected: str) -> None:
    assert expected in problems(evaluation=stated)


def test_a_proximal_term_needs_fed_prox() -> None:
    training = {"proximal_mu": 0.1}
    assert "proximal_mu 0 unless" in problems(training=training)
    prox = parse_run_config(LEAST | {"training": training | {"strategy": "fed_prox"}}, PATH)
    assert prox.training.proximal_mu == 0.1
    without = parse_run_config(LEAST | {"training": {"strategy": "fed_prox"}}, PATH)
    assert without.training.proximal_mu == 0.0


def test_sgd_needs_a_clip_only_where_updates_are_encoded() -> None:
    sgd = {"optimizer": "sgd"}
    assert "protection.clip: expected a range" in problems(training=sgd)
    config = parse_run_config(LEAST | {"training": sgd, "protection": {"kind": "plain"}}, PATH)
    assert clip_of(config.encoding, config.training, weight_cap=8) > 0  # every sum asks for one


def test_devices_of_unequal_rank_are_weighted_by_their_norms_and_need_a_clip() -> None:
    assert "protection.clip: expected a range" in problems(training={"lora": "hetlora"})
    clip = {"clip": 0.5}
    terms = parse_run_config(
        LEAST | {"training": {"lora": "hetlora"}, "protection": clip}, PATH
    ).training
    assert (terms.lora, terms.weighting) == (LoraRule.HETLORA, Weighting.FACTOR_NORM)
    for key, value, named in (
        ("strategy", "fed_dyn", "a strategy that sends a movement alone with lora HETLORA"),
        ("personal", "fedper", "personal NONE with lora HETLORA (lora FEDIT goes with it"),
        ("rank_decay", 0.5, "rank_penalty and rank_decay both above 0"),
    ):
        training = {"lora": "hetlora", "weighting": "uniform", key: value}
        cohort = {"population": 100} if value == "fed_dyn" else {}
        assert named in problems(training=training, protection=clip, cohort=cohort)
    median = {"rule": "median"}
    found = problems(training={"lora": "hetlora"}, protection={"kind": "plain"}, aggregation=median)
    assert "takes an update of a small rank" in found
    found = problems(training={"weighting": "factor_norm", "lora": "ffa"})
    assert "weighting SAMPLES, UNIFORM or COMPUTE unless lora is HETLORA" in found


@pytest.mark.parametrize("kind", ["masked", "encrypted", "sealed"])
@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex"])
def test_a_rule_that_needs_every_devices_factors_goes_with_plain_updates_alone(
    name: str, kind: str
) -> None:
    found = problems(training={"lora": name}, protection={"kind": kind})
    assert f'protection.kind = "{kind}" hides from the coordinator' in found
    assert 'training.lora = "ffa" or "rolora"' in found
    plain = {"training": {"lora": name}, "protection": {"kind": "plain"}}
    assert parse_run_config(LEAST | plain, PATH).training.lora.name.lower() == name
    momentum = {"lora": name, "strategy": "fed_avg_m"}
    assert "lora FFA" in problems(training=momentum, protection={"kind": "plain"})


def test_what_travels_and_what_stays_is_read_from_the_file() -> None:
    training = {"lora": "rolora", "personal": "fedrep", "head_steps": 3, "fine_tune_steps": 10}
    terms = parse_run_config(LEAST | {"training": training}, PATH).training
    assert (terms.lora, terms.personal) == (LoraRule.ROLORA, Personal.FEDREP)
    assert (terms.head_steps, terms.fine_tune_steps) == (3, 10)
    plain = parse_run_config(LEAST, PATH).training
    assert (plain.lora, plain.personal) == (LoraRule.FEDIT, Personal.NONE)


def test_robust_rules_go_with_plain_updates_alone() -> None:
    table = {"rule": "krum", "faulty": 1}
    plain = {"protection": {"kind": "plain"}, "cohort": {"minimum": 5}}
    made = parse_run_config(LEAST | plain | {"aggregation": table}, PATH).aggregation
    assert made == Aggregation(Rule.KRUM, faulty=1)
    found = problems(aggregation=table, cohort={"minimum": 5})
    assert '"krum" reads every update, which protection.kind = "sealed" hides' in found
    assert 'use protection.kind = "plain"' in found
    assert "cohort.minimum above 2 faulty + 2" in problems(aggregation=table)
    assert "aggregation.rule: expected one of" in problems(aggregation={"rule": "bulyan"})
    assert "aggregation.byzantine: unknown key" in problems(aggregation={"byzantine": 1})
    median = {"aggregation": {"rule": "geometric_median", "iterations": 5}}
    assert parse_run_config(LEAST | plain | median, PATH).aggregation.smoothing == 1e-6


def test_groups_go_with_every_protection_and_say_what_else_they_need() -> None:
    grouped = {"rule": "trimmed_mean", "trim": 0.25, "groups": 4}
    for kind in Protection:
        table = {"protection": {"kind": kind.name.lower()}, "cohort": {"minimum": 12}}
        terms = parse_run_config(LEAST | table | {"aggregation": grouped}, PATH).training
        assert (terms.groups, terms.group_rule) == (4, GroupRule.TRIMMED_MEAN)
        assert terms.group_trim == 0.25
    one = {"aggregation": {"groups": 1}}
    assert parse_run_config(LEAST | one, PATH) == parse_run_config(LEAST, PATH)
    found = problems(aggregation={"rule": "median", "groups": 4}, cohort={"minimum": 11})
    assert "cohort.minimum: expected at least 3 for each of the 4 groups, 12, found 11" in found
    twelve = {"minimum": 12}
    for wrong, told in (
        ({"groups": 2, "rule": "median"}, "aggregation.groups: expected 1, or 3..100"),
        ({"groups": 4}, 'with aggregation.groups, found "mean"'),
        ({"groups": 4, "rule": "multi_krum", "faulty": 1}, 'found "multi_krum"'),
        ({"groups": 4, "rule": "trimmed_mean"}, "at least 1/groups = 0.25"),
        ({"groups": 4, "rule": "geometric_median", "iterations": 5}, "the default iterations"),
    ):
        assert told in problems(aggregation=wrong, cohort=twelve)
    median = {"groups": 4, "rule": "median"}
    dyn = {"training": {"strategy": "fed_dyn", "weighting": "uniform", "max_steps": 1}}
    told = problems(aggregation=median, cohort={"minimum": 12, "population": 100}, **dyn)
    assert "aggregation.groups: expected a strategy whose server may leave updates out" in told
    factors = {"training": {"lora": "flexlora"}, "protection": {"kind": "plain"}}
    told = problems(aggregation=median, cohort=twelve, **factors)
    assert 'training.lora = "flexlora" both say what is made of the updates' in told
    told = problems(aggregation=median, cohort=twelve, training={"lora": "hetlora"})
    assert 'training.lora = "fedit" at one rank' in told


def training_of(strategy: str, **changes: Any) -> LocalTraining:
    """Return the terms of a file that says no more than this."""
    cohort = {"size": 4, "population": 9} if strategy in ("scaffold", "fed_dyn") else {}
    table = {"strategy": strategy} | changes
    protection = {"clip": 0.5} if changes.get("optimizer") == "sgd" else {}
    made = {"cohort": cohort, "training": table, "protection": protection}
    return parse_run_config(LEAST | made, PATH).training


SCAFFOLD = {"optimizer": "sgd", "weighting": "uniform", "local_steps": 4}
NOVA = {"optimizer": "sgd", "max_steps": 50}


def test_each_strategy_has_defaults_of_its_own() -> None:
    adam = training_of("fed_adam")
    assert (adam.server_momentum, adam.server_second_momentum) == (0.9, 0.99)
    assert (adam.server_adaptivity, adam.server_learning_rate) == (1e-3, 0.01)
    assert training_of("fed_adam", server_momentum=0.5).server_momentum == 0.5
    assert training_of("fed_avg_m").server_momentum == 0.9
    assert training_of("fed_dyn", weighting="uniform", local_steps=3).dynamic_alpha == 0.1
    assert training_of("fed_avg").server_learning_rate == 1


def test_one_clip_suits_both_parts_of_an_update() -> None:
    scaffold = training_of("scaffold", **SCAFFOLD, learning_rate=0.1)
    assert scaffold.auxiliary_scale == pytest.approx(0.1 * 4)
    assert scaffold.population == 9
    stated = training_of("scaffold", **SCAFFOLD, auxiliary_scale=2.0)
    assert stated.auxiliary_scale == 2.0
    for momentum in (0.0, 0.9):
        nova = training_of("fed_nova", **NOVA, momentum=momentum)
        most = nova.auxiliary_scale * effective_steps(nova, 50)
        assert most == pytest.approx(0.5, rel=2e-3)
        assert most < 0.5  # the clip: no number of steps saturates


@pytest.mark.parametrize(
    ("strategy", "changes", "expected"),
    [
        ("scaffold", {}, "optimizer SGD with SCAFFOLD"),
        ("scaffold", {"optimizer": "sgd", "local_steps": 4}, "weighting UNIFORM with SCAFFOLD"),
        ("scaffold", SCAFFOLD | {"local_steps": 0}, "training.max_steps: expected a bound"),
        ("fed_nova", {"optimizer": "sgd"}, "training.max_steps: expected a bound"),
        ("fed_nova", NOVA | {"auxiliary_scale": 0.1}, "training.auxiliary_scale: expected at most"),
        ("fed_nova", NOVA | {"max_steps": 10**30}, "max_steps in 0..1000000"),
        ("fed_dyn", {"local_steps": 2}, "weighting UNIFORM with FED_DYN"),
        ("fed_dyn", {"weighting": "uniform"}, "protection.clip: expected a range"),
        ("fed_avg", {"server_momentum": 0.9}, "server_momentum 0 unless the strategy is"),
        ("fed_avg", {"auxiliary_scale": 1.0}, "auxiliary_scale 0 unless the strategy is"),
        ("fed_avg", {"population": 9}, "training.population: unknown key"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_an_error(
    strategy: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        training_of(strategy, **changes)
    assert expected in caught.value.problem


def test_a_population_is_everybody_who_may_take_part() -> None:
    training = {"strategy": "scaffold"} | SCAFFOLD
    for cohort in ({"size": 4}, {"size": 4, "population": 3}, {"population": 50}):
        found = problems(training=training, cohort=cohort, protection={"clip": 1.0})
        assert "cohort.population: expected all agents that may ever take part" in found
    assert "population 0 unless" in problems(cohort={"population": 200})


def test_uniform_weights_need_a_bound_on_steps_or_a_clip() -> None:
    uniform = {"weighting": "uniform"}
    assert "protection.clip: expected a range" in problems(training=uniform)
    for more in ({"local_steps": 5}, {"max_steps": 5}):
        config = parse_run_config(LEAST | {"training": uniform | more}, PATH)
        assert clip_of(config.encoding, config.training, 1) == pytest.approx(1.25 * 1e-3 * 5)


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"learning_rate": 1e39}},
        {"training": {"learning_rate": 1e-30}},
        {"protection": {"clip": 1e30}},
        {"cohort": {"size": 10_000}, "protection": {"update_bits": 8}},
    ],
    ids=str,
)
def test_what_no_cohort_could_encode_is_an_error_before_the_run(change: dict[str, Any]) -> None:
    assert "protection: " in problems(**change)
    plain = change | {"protection": {"kind": "plain"}}
    assert parse_run_config(LEAST | plain, PATH).encoding.protection is Protection.PLAIN


@pytest.mark.parametrize(
    "content",
    [b"rounds = ", b"\xff\xfe", b"rounds = 1\nrounds = 2", b"rounds = " + b"9" * 5000],
    ids=["syntax", "not UTF-8", "twice", "too many digits"],
)
def test_a_file_that_is_not_toml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        load_run_config(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_run_config(tmp_path / "absent.toml")


def test_the_example_in_the_docstring_is_a_good_file() -> None:
    import coordinator.config as module

    assert module.__doc__ is not None
    text = module.__doc__[module.__doc__.index("name =") :]
    assert parse_run_config(tomllib.loads(text), PATH).cohort == CohortTerms(3, 100)


def asynchronous(**tables: dict[str, Any]) -> RunConfig:
    """Parse the least run file of an asynchronous run, with other values."""
    least = {"training": {"strategy": "fed_buff"}, "asynchronous": {"buffer": 4}}
    return parse_run_config({**LEAST, **least, **tables}, PATH)


def test_an_asynchronous_run_has_the_papers_defaults() -> None:
    config = asynchronous()
    assert (config.policy.buffer, config.policy.max_staleness) == (4, 10)
    assert config.encoding.capacity == 4  # no sum holds more
    training = config.training
    assert training.staleness_weighting is StalenessWeighting.POLYNOMIAL
    assert (training.staleness_exponent, training.mixing) == (0.5, 0.0)
    constant = asynchronous(asynchronous={"buffer": 4, "staleness_weighting": "constant"})
    assert constant.training.staleness_exponent == 0.0
    mixing = asynchronous(training={"strategy": "fed_async", "proximal_mu": 0.1})
    assert mixing.training.mixing == 0.6


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"asynchronous": {}}, 'buffer: expected how many.*nearest that is not is "fed_avg"'),
        ({"asynchronous": {"buffer": 2}}, r"buffer: expected cohort.minimum = 3 \.\. cohort.size"),
        ({"asynchronous": {"buffer": 101}}, "buffer: expected cohort.minimum"),
        ({"cohort": {"quorum": 3}}, r"cohort.quorum: expected 0 with \[asynchronous\]"),
        ({"selection": {"rule": "capability"}}, 'selection.rule: expected "uniform" with'),
        ({"selection": {"over_selection": 1.3}}, "selection.over_selection: expected 1 with"),
        ({"selection": {"most_rounds": 1, "window": 3}}, "selection.most_rounds: expected 0 with"),
        ({"compression": {"kind": "random_mask"}}, "expected compression NONE with FED_BUFF"),
        ({"training": {"strategy": "fed_buff", "lora": "flexlora"}}, "expected strategy FED_AVG"),
        ({"aggregation": {"groups": 3, "rule": "median"}}, 'found "fed_buff"; use training'),
        ({"training": {"strategy": "fed_avg"}}, 'use "fed_buff" or "fed_async", or leave'),
        ({"training": {"strategy": "scaffold"}}, "takes no update from an older state"),
        ({"training": {"strategy": "fed_buff", "lora": "rolora"}}, "lora FEDIT or FFA"),
        ({"training": {"strategy": "fed_buff", "personal": "fedper"}}, "personal NONE"),
        ({"training": {"strategy": "fed_buff", "max_staleness": 3}}, "unknown key"),
        ({"aggregation": {"rule": "median"}, "protection": {"kind": "plain"}}, "fed_avg"),
        ({"asynchronous": {"buffer": 4, "mixing": 0.5}}, "mixing 0 unless the strategy is"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused_with_what_can(
    tables: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        asynchronous(**tables)


def test_all_that_is_wrong_with_an_asynchronous_run_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        asynchronous(asynchronous={"buffer": 2, "max_staleness": -1}, cohort={"quorum": 5})
    for key in ("asynchronous.buffer", "max_staleness", "cohort.quorum"):
        assert key in caught.value.problem


_KEYS = st.sampled_from(
    [
        "name",
        "plan",
        "rounds",
        "cohort",
        "training",
        "protection",
        "deadlines",
        "activation",
        "minimum",
        "size",
    ]
    + ["kind", "clip", "update_bits", "strategy", "optimizer", "", "a.b", "population", "buffer"]
    + [field.name for field in (*fields(LocalTraining), *fields(Deadlines))]
)
_VALUES = st.one_of(
    st.booleans(),
    st.integers(),
    st.sampled_from([1, 2, 8, 16, 10**400, -(10**400)]),
    st.floats(),
    st.text(),
    st.sampled_from(["sgd", "adamw", "fed_prox", "plain", "encrypted", "p", "\0"]),
    st.sampled_from(["scaffold", "fed_nova", "fed_adam", "fed_dyn", "uniform", "cosine"]),
    st.sampled_from(["fed_buff", "fed_async", "hinge"]),
    st.dates(),
)
_TABLES = st.recursive(
    st.dictionaries(_KEYS, _VALUES, max_size=6),
    lambda tables: st.dictionaries(_KEYS, _VALUES | tables | st.lists(tables), max_size=6),
    max_leaves=20,
)
_LIKELY = st.fixed_dictionaries(
    {"plan": st.just("p"), "rounds": st.integers(0, 9)},
    optional={
        table: st.dictionaries(_KEYS, _VALUES, max_size=3)
        for table in (
            "cohort",
            "training",
            "protection",
            "deadlines",
            "activation",
            "asynchronous",
        )
    },
)


@given(_TABLES | _LIKELY)
def test_any_table_is_a_config_or_a_config_error(table: dict[str, Any]) -> None:
    try:
        config = parse_run_config(table, PATH)
    except ConfigError:
        return
    _assert_usable(config)


def _assert_usable(config: RunConfig) -> None:
    """Whatever is accepted opens a cohort of any weight."""
    for weight_cap in (1, 1 << MAX_WEIGHT_CLASS):
        context = crypto.UpdateContext(
            run_id=bytes(16),
            round=config.rounds,
            attempt=1,
            parameter_count=1000,
            capacity=config.encoding.capacity,
            weight_cap=weight_cap,
            clip=clip_of(config.encoding, config.training, weight_cap),
            update_bits=config.encoding.update_bits,
            cohort=bytes(32 if config.encoding.protection.has_masks else 0),
        )
        if config.encoding.protection is not Protection.PLAIN:
            crypto.BfvParameters.derive(context, config.encoding.protection.name.lower())
