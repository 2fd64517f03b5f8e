"""What the operator writes: `run.toml`, as frozen values. Every problem is named at once.

name = "intent"
plan = "plans/intent"          # folder made by `fedloom-coordinator plan build`
rounds = 5

[cohort]                       # who takes part
minimum = 3
size = 100
quorum = 0                     # agents that suffice once they are ready; 0: all who were invited
population = 0                 # agents that may ever take part; "scaffold" and "fed_dyn" need it

[selection]                    # who is invited; coordinator/selection.py has the rules' papers
rule = "uniform"               # "available": whose hours leave time for a round; "capability": of
                               # these, slower ones more rarely
over_selection = 1.0           # invitations for each place; above 1 the first `size` that are ready
                               # make the cohort
most_rounds = 0                # that an agent is invited to in `window` finished rounds in a row;
window = 0                     # 0: any
round_seconds = 0.0            # that an agent should need; 0: deadlines.training
least_memory_mb = 0            # that an agent must have told, 10^6 bytes
least_samples_per_second = 0.0 # in its last training
engine = ""                    # or "onnx", "torch": that it must have
pacing = "steered"             # surplus agents are told to leave and when to come back; or "none";
                               # nobody is surplus in an asynchronous run
reserve = 1.0                  # agents that stay for the next round, for each that a round invites

[training]                     # on every agent; control.proto says what each key is
strategy = "fed_avg"           # one of those in coordinator/strategies/README.md
weighting = "samples"          # or "uniform", "compute", of hetlora "factor_norm", its default
optimizer = "adamw"            # or "sgd", "adagrad"
epochs = 1                     # or local_steps; max_steps bounds epochs
batch_size = 16
learning_rate = 1e-3
step_schedule = "constant"     # or "cosine", over a round's steps, after warmup_steps
round_schedule = "constant"    # or "cosine", over the run's rounds, after warmup_rounds
gradient_clip = 0.0            # largest L2 norm of a gradient; 0: any
lora = "fedit"                 # or "ffa", "rolora", "fedsa": which factors are trained and sent;
                               # "hetlora": [adapter] rank of agent.toml (rank_penalty and
                               # rank_decay prune it); "fed_sb" of plans built with --lora sb
                               # under "plain" also "flexlora", and with a plan built with
                               # --residual "flora", "fedex": what is made of the factors
personal = "none"              # or "fedper", "fedrep" (head_steps), "ditto" (personal_lambda)
fine_tune_steps = 0            # that each agent makes alone with the finished run's model

[protection]
kind = "sealed"                # or "encrypted", "masked", "plain"
update_bits = 16               # or 8
clip = 0.05                    # needed with sgd, or with uniform weights and no bound on steps
release = "agents"             # or "coordinator": agents hand the opened sums over

[activation]                   # optional: what a model must reach on held-out data to be used
minimum_accuracy = 0.8
maximum_loss = 1.0             # nats for each label; or maximum_perplexity
maximum_accuracy_drop = 0.02   # against the model in use
maximum_loss_rise = 0.1
[evaluation]                   # quality on what agents hold out
report = "mean"                # summed with the updates; or "each": every agent's, in clear, the
                               # default under "plain"; or "none"
tell = true                    # agents tell the coordinator the mean that they have opened
loss_bound = 0.0               # larger losses count as this; 0: by the plan's task
patience = 0                   # end the run after as many rounds without a better mean; 0: never
metric = "loss"                # that decides: fedloom.quality names them
minimum_delta = 0.0            # by less than this it is no better

[asynchronous]                 # only with "fed_buff" and "fed_async": nobody waits for a slow agent
buffer = 0                     # agents that are ready first make a cohort; above 0, and needed
max_staleness = 0              # rounds by which an update may be older than its sum's state; 10
staleness_weighting = "constant"  # what an older one counts for: or "hinge", "polynomial", theirs
staleness_exponent = 0.0       # a of "polynomial" and "hinge"; 0.5
staleness_threshold = 0        # b of "hinge"
mixing = 0.0                   # alpha of "fed_async"; 0.6

[aggregation]                  # what is made of a round's updates
rule = "mean"                  # "plain" alone: one of those in coordinator/strategies/README.md
groups = 1                     # 3 or more: a sum for each of so many random groups, under any
                               # protection; rule: "median", "trimmed_mean", "geometric_median"

[compression]                  # what of an update travels
kind = "random_mask"           # or "none", the default; under "plain" also "top_k", "quantised"
share = 0.1                    # of the values, that "random_mask" and "top_k" send
error_feedback = false         # what is not sent waits on the agent; true unless said with "top_k"
unbiased = true                # "random_mask": what is sent counts for what is not

[deadlines]                    # seconds
training = 3600
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

from coordinator import asynchronous
from coordinator.aggregation import DEFAULTS, MEAN, Aggregation
from coordinator.aggregation import Rule as AggregationRule
from coordinator.compression import DEFAULT_SHARE, compression_problems
from coordinator.plateau import NO_PLATEAU, PlateauRule
from coordinator.run_state import RunPolicy
from coordinator.selection import UNIFORM, Bounds, Pacing, Selection, SelectionRule
from coordinator.selection import problems as selection_problems
from fedloom.compression import Compression
from fedloom.errors import ConfigError, Refused
from fedloom.gates import OPEN_GATE, ActivationGate
from fedloom.quality import DEFAULT_EVALUATION, EvaluationTerms, Metric, Report
from fedloom.schedules import effective_steps
from fedloom.terms import (
    LORA_DEFAULTS,
    MAX_CAPACITY,
    MAX_STEPS,
    MAX_WEIGHT_CLASS,
    MOVEMENTS,
    NEEDS_FACTORS,
    STRATEGIES_WITH,
    STRATEGY_DEFAULTS,
    Encoding,
    LocalTraining,
    LoraRule,
    Protection,
    Release,
    StalenessWeighting,
    Strategy,
    clip_of,
    implies_clip,
)

MAX_DEADLINE_SECONDS = 366 * 86_400.0
_ANY_CLIP = 1.0  # `plain` clips nothing, and still binds its updates to a number


SMALLEST_MASKED_COHORT = 3  # a sum of two tells each the other's update


@dataclass(frozen=True)
class CohortTerms:
    """How many agents take part in a round."""

    minimum: int = 3
    size: int = 100
    quorum: int = 0
    population: int = 0  # that may ever take part; 0: not stated


@dataclass(frozen=True)
class Deadlines:
    """Longest times in seconds before a phase goes on without those who are missing."""

    gathering: float = 3600.0
    training: float = 3600.0
    upload: float = 600.0
    applying: float = 600.0


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    name: str
    plan: Path
    rounds: int
    cohort: CohortTerms
    training: LocalTraining
    encoding: Encoding
    deadlines: Deadlines
    release: Release = Release.AGENTS
    gate: ActivationGate = OPEN_GATE
    evaluation: EvaluationTerms = DEFAULT_EVALUATION
    plateau: PlateauRule = NO_PLATEAU
    aggregation: Aggregation = MEAN
    buffer: int = 0  # ready agents that make a cohort of an asynchronous run; 0: it is none
    selection: Selection = UNIFORM

    @property
    def returns_sums(self) -> bool:
        """Whether agents hand over sums that the coordinator cannot open."""
        return self.release is Release.COORDINATOR and self.encoding.protection.needs_tenseal

    @property
    def bounds(self) -> Bounds:
        """What of the run its selection must agree with."""
        return _bounds(self.cohort, self.deadlines)

    @property
    def policy(self) -> RunPolicy:
        """What decides how the run goes."""
        return RunPolicy(
            rounds=self.rounds,
            minimum_agents=self.cohort.minimum,
            cohort_size=self.cohort.size,
            needs_key=self.encoding.protection.has_run_key,
            gathering_seconds=self.deadlines.gathering,
            training_seconds=self.deadlines.training,
            upload_seconds=self.deadlines.upload,
            applying_seconds=self.deadlines.applying,
            seed=self.training.seed,
            has_masks=self.encoding.protection.has_masks,
            quorum=self.cohort.quorum,
            returns_sums=self.returns_sums,
            plateau=self.plateau,
            buffer=self.buffer,
            max_staleness=self.training.max_staleness,
            selection=self.selection.within(self.deadlines.training),
        )


def load_run_config(path: Path) -> RunConfig:
    """Read and check `run.toml`; raises ConfigError that names every problem found."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # syntax, encoding, or a number of too many digits
        raise ConfigError(str(path), f"is not TOML: {error}") from error
    return parse_run_config(table, path)


def parse_run_config(table: Mapping[str, Any], path: Path) -> RunConfig:
    """Check the parsed file; relative paths are relative to the file's folder."""
    return _run_config(_Reader(table), path)


def known_keys() -> dict[str, type]:
    """Return every key of a run file, dotted, with the kind of its value."""
    reader = _Reader({})
    with suppress(ConfigError):  # an empty file names no plan
        _run_config(reader, Path("run.toml"))
    return reader.kinds


def _run_config(reader: "_Reader", path: Path) -> RunConfig:
    name = reader.value("name", str, path.stem)
    plan = reader.value("plan", str, "")
    rounds = reader.value("rounds", int, 0)
    cohort = CohortTerms(
        minimum=reader.value("cohort.minimum", int, CohortTerms.minimum),
        size=reader.value("cohort.size", int, CohortTerms.size),
        quorum=reader.value("cohort.quorum", int, CohortTerms.quorum),
        population=reader.value("cohort.population", int, CohortTerms.population),
    )
    deadlines = Deadlines(
        **{
            field.name: reader.value(f"deadlines.{field.name}", float, field.default)
            for field in fields(Deadlines)
        }
    )
    buffer = reader.value("asynchronous.buffer", int, 0)
    encoding = reader.checked(
        lambda: _encoding(reader, cohort, buffer), Encoding(Protection.ENCRYPTED)
    )
    aggregation = _aggregation(reader)
    training = reader.checked(
        lambda: _training(reader, cohort, encoding, aggregation, buffer), LocalTraining()
    )
    release = reader.member("protection.release", Release, Release.AGENTS)
    gate = reader.checked(lambda: _gate(reader), OPEN_GATE)
    plateau = _plateau(reader)
    evaluation = reader.checked(
        lambda: _evaluation(reader, encoding.protection, plateau), DEFAULT_EVALUATION
    )
    selection = _selection(reader, cohort, deadlines)
    for problem in aggregation.problems(encoding, training, cohort.minimum):
        reader.require(False, problem)
    lora = training.lora.name.lower()
    reader.require(
        training.lora not in NEEDS_FACTORS or encoding.protection is Protection.PLAIN,
        f'training.lora: "{lora}" needs every device\'s factors, which protection.kind = '
        f'"{encoding.protection.name.lower()}" hides from the coordinator; use protection.kind = '
        '"plain", or training.lora = "ffa" or "rolora", whose mean of products is exact as well',
    )
    for problem in asynchronous.selection_problems(buffer, selection):
        reader.require(False, problem)
    for problem in compression_problems(training.compression, encoding, aggregation):
        reader.require(False, problem)
    reader.require("\0" not in name, "name: expected a text without NUL")
    reader.require(bool(plan) and "\0" not in plan, "plan: expected the folder of a plan")
    reader.require(1 <= rounds <= 100_000, f"rounds: expected 1..100000, found {rounds}")
    reader.require(
        1 <= cohort.minimum <= cohort.size,
        f"cohort: expected 1 <= minimum <= size, found {cohort.minimum} and {cohort.size}",
    )
    reader.require(
        cohort.quorum == 0 or cohort.minimum <= cohort.quorum <= cohort.size,
        f"cohort.quorum: expected 0 or {cohort.minimum}..{cohort.size}, found {cohort.quorum}",
    )
    reader.require(
        release is Release.AGENTS or cohort.minimum > 1,
        "protection.release: expected at least two agents, who confirm each other's sums; "
        "found cohort.minimum = 1",
    )
    reader.require(
        cohort.minimum >= SMALLEST_MASKED_COHORT or not encoding.protection.has_masks,
        f"cohort.minimum: expected {SMALLEST_MASKED_COHORT} under masks, found {cohort.minimum}; "
        'two who trust each other use protection.kind = "encrypted"',
    )
    reader.require(
        all(
            0 < getattr(deadlines, field.name) <= MAX_DEADLINE_SECONDS
            for field in fields(Deadlines)
        ),
        f"deadlines: expected seconds above 0, {MAX_DEADLINE_SECONDS:.0f} at most, "
        f"found {deadlines}",
    )
    reader.require(
        implies_clip(training) or encoding.clip > 0,
        "protection.clip: expected a range for the updates' values, because sgd implies none, and "
        'neither do lora = "hetlora" (beyond a device\'s rank a value moves by all of itself) nor '
        "uniform weights without training.local_steps or training.max_steps",
    )
    problem = unencodable(encoding, training)
    reader.require(not problem, f"protection: {problem}")
    reader.finish(path)
    return RunConfig(
        name,
        (path.parent / plan).resolve(),
        rounds,
        cohort,
        training,
        encoding,
        deadlines,
        release,
        gate,
        evaluation,
        plateau,
        aggregation,
        buffer,
        selection,
    )


def _plateau(reader: "_Reader") -> PlateauRule:
    default = NO_PLATEAU
    rule = PlateauRule(
        reader.value("evaluation.patience", int, default.patience),
        reader.member("evaluation.metric", Metric, default.metric),
        reader.value("evaluation.minimum_delta", float, default.minimum_delta),
    )
    reader.require(
        rule.patience >= 0, f"evaluation.patience: expected 0 or more, found {rule.patience}"
    )
    reader.require(
        0 <= rule.minimum_delta < math.inf,
        f"evaluation.minimum_delta: expected 0 or more, found {rule.minimum_delta}",
    )
    return rule


def _evaluation(reader: "_Reader", protection: Protection, plateau: PlateauRule) -> EvaluationTerms:
    in_clear = protection is Protection.PLAIN and not plateau.patience
    report = reader.member(
        "evaluation.report", Report, Report.EACH if in_clear else EvaluationTerms.report
    )
    tell = reader.value("evaluation.tell", bool, EvaluationTerms.tell)
    reader.require(
        not plateau.patience or (report is Report.MEAN and tell),
        'evaluation.patience: expected report = "mean" and tell = true, because only a mean that '
        "agents tell shows the coordinator a plateau",
    )
    bound = reader.value("evaluation.loss_bound", float, EvaluationTerms.loss_bound)
    return EvaluationTerms(report, tell, bound)


def _aggregation(reader: "_Reader") -> Aggregation:
    rule = reader.member("aggregation.rule", AggregationRule, AggregationRule.MEAN)
    values: dict[str, Any] = {}
    for field in fields(Aggregation)[1:]:
        default: Any = DEFAULTS.get(rule, {}).get(field.name, field.default)
        values[field.name] = reader.value(f"aggregation.{field.name}", type(default), default)
    return Aggregation(rule, **values)


def _bounds(cohort: CohortTerms, deadlines: Deadlines) -> Bounds:
    places = max(1, cohort.size)
    return Bounds(cohort.minimum, places, cohort.population, MAX_CAPACITY, deadlines.training)


def _selection(reader: "_Reader", cohort: CohortTerms, deadlines: Deadlines) -> Selection:
    values: dict[str, Any] = {
        "rule": reader.member("selection.rule", SelectionRule, UNIFORM.rule),
        "pacing": reader.member("selection.pacing", Pacing, UNIFORM.pacing),
    }
    for field in fields(Selection):
        if field.name not in values:
            key, default = f"selection.{field.name}", field.default
            values[field.name] = reader.value(key, type(default), default)
    selection = Selection(**values)
    for problem in selection_problems(selection, _bounds(cohort, deadlines)):
        reader.require(False, problem)
    return selection


def _training(
    reader: "_Reader",
    cohort: CohortTerms,
    encoding: Encoding,
    aggregation: Aggregation,
    buffer: int,
) -> LocalTraining:
    strategy = reader.member("training.strategy", Strategy, LocalTraining.strategy)
    lora = reader.member("training.lora", LoraRule, LocalTraining.lora)
    values: dict[str, Any] = {
        "strategy": strategy,
        "population": cohort.population,
        "lora": lora,
    }
    values |= _staleness(reader, strategy)
    values |= _compression(reader) | aggregation.group_terms
    for field in fields(LocalTraining):
        if field.name in values:
            continue
        key, default = f"training.{field.name}", field.default
        if isinstance(default, IntEnum):
            default = LORA_DEFAULTS.get(lora, {}).get(field.name, default)
            values[field.name] = reader.member(key, type(default), default)
        else:
            default = STRATEGY_DEFAULTS.get(strategy, {}).get(field.name, default)
            values[field.name] = reader.value(key, type(default), default)
    if strategy not in MOVEMENTS or lora in (*NEEDS_FACTORS, LoraRule.HETLORA):
        values["groups"], values["group_trim"] = 0, 0.0  # `problems` says that they do not go so
    _check_population(reader, strategy, cohort)
    for problem in asynchronous.problems(
        buffer, strategy, cohort.quorum, cohort.minimum, cohort.size
    ):
        reader.require(False, problem)
    if strategy in STRATEGIES_WITH["auxiliary_scale"]:
        values["auxiliary_scale"] = _auxiliary_scale(reader, values, encoding)
    return LocalTraining(**values)


def _staleness(reader: "_Reader", strategy: Strategy) -> dict[str, Any]:
    default = STRATEGY_DEFAULTS.get(strategy, {}).get("staleness_weighting", 1)
    key, member = "asynchronous.staleness_weighting", StalenessWeighting(int(default))
    weighting = reader.member(key, StalenessWeighting, member)
    values: dict[str, Any] = {"staleness_weighting": weighting}
    told = asynchronous.defaults(strategy, weighting)
    for name in asynchronous.TRAINING_KEYS:
        if name not in values:
            value = told.get(name, getattr(LocalTraining, name))
            values[name] = reader.value(f"asynchronous.{name}", type(value), value)
    return values


def _compression(reader: "_Reader") -> dict[str, Any]:
    kind = reader.member("compression.kind", Compression, Compression.NONE)
    share = DEFAULT_SHARE if kind.chooses else 0.0
    waits = reader.value("compression.error_feedback", bool, kind is Compression.TOP_K)
    is_scaled = kind is Compression.RANDOM_MASK and not waits
    return {
        "compression": kind,
        "compression_share": reader.value("compression.share", float, share),
        "error_feedback": waits,
        "unbiased": reader.value("compression.unbiased", bool, is_scaled),
    }


def _gate(reader: "_Reader") -> ActivationGate:
    bounds = {
        field.name: reader.optional(f"activation.{field.name}") for field in fields(ActivationGate)
    }
    perplexity = reader.optional("activation.maximum_perplexity")
    if perplexity is not None:
        reader.require(
            perplexity >= 1 and bounds["maximum_loss"] is None,
            "activation.maximum_perplexity: expected at least 1, and no maximum_loss beside it; "
            f"found {perplexity}",
        )
        bounds["maximum_loss"] = math.log(max(perplexity, 1.0))
    return ActivationGate(**bounds)


def _check_population(reader: "_Reader", strategy: Strategy, cohort: CohortTerms) -> None:
    if strategy in STRATEGIES_WITH["population"]:
        reader.require(
            cohort.population >= cohort.size,
            f"cohort.population: expected all agents that may ever take part, at least cohort.size "
            f"= {cohort.size}, found {cohort.population}; {strategy.name.lower()} divides by it",
        )


def _auxiliary_scale(reader: "_Reader", values: Mapping[str, Any], encoding: Encoding) -> float:
    """Return the factor that makes one clip suit both parts of such an update; the stated one.

    SCAFFOLD: a movement is about learning rate x steps x gradient, a control variate a gradient.
    FedNova: the largest number of steps comes out a thousandth below the clip.
    """
    stated: float = values["auxiliary_scale"]
    bound = values["local_steps"] or values["max_steps"]
    is_scaffold = values["strategy"] is Strategy.SCAFFOLD
    reader.require(
        bound > 0 or (is_scaffold and stated > 0),
        "training.max_steps: expected a bound on a round's steps, or training.local_steps; what "
        f"{values['strategy'].name.lower()} sends is scaled by it",
    )
    if not 0 < bound <= MAX_STEPS or (is_scaffold and stated):
        return stated or 1.0
    steps = effective_steps(LocalTraining(momentum=values["momentum"]), bound)
    if is_scaffold:
        return float(values["learning_rate"] * steps)
    largest = 0.999 * (encoding.clip or _ANY_CLIP) / steps
    reader.require(
        stated <= largest,
        f"training.auxiliary_scale: expected at most {largest:g}, by which {bound} steps stay "
        f"within the clip, found {stated}",
    )
    return stated or largest


def _encoding(reader: "_Reader", cohort: CohortTerms, buffer: int) -> Encoding:
    protection = reader.member("protection.kind", Protection, Protection.SEALED)
    clip = reader.value("protection.clip", float, 0.0)
    return Encoding(
        protection=protection,
        capacity=buffer or cohort.size,
        clip=_ANY_CLIP if protection is Protection.PLAIN and clip == 0 else clip,
        update_bits=reader.value("protection.update_bits", int, 16),
    )


def unencodable(encoding: Encoding, training: LocalTraining, update_length: int = 1) -> str:
    """Say why a cohort's updates could not be encoded: better now than after they are trained."""
    import crypto  # and numpy with it: a list of runs reads their files and encodes nothing

    stated = encoding.clip > 0 or implies_clip(training)
    if encoding.protection is Protection.PLAIN or not stated:
        return ""
    for weight_cap in (1, 1 << MAX_WEIGHT_CLASS):
        try:
            crypto.BfvParameters.derive(
                crypto.UpdateContext(
                    run_id=bytes(16),
                    round=1,
                    attempt=1,
                    parameter_count=update_length,
                    capacity=encoding.capacity,
                    weight_cap=weight_cap,
                    clip=clip_of(encoding, training, weight_cap),
                    update_bits=encoding.update_bits,
                    cohort=bytes(32 if encoding.protection.has_masks else 0),
                ),
                encoding.protection.name.lower(),
            )
        except crypto.CryptoError as error:
            return str(error)
    return ""


class _Reader:
    """Takes values out of a table and remembers every problem and every key that was asked for."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._values = dict(_flatten(table))
        self.kinds: dict[str, type] = {}  # of every key that was asked for
        self._problems: list[str] = []

    def value(self, key: str, kind: type, default: Any) -> Any:
        self.kinds[key] = kind
        found = self._values.get(key, default)
        if kind is float and type(found) is int and abs(found) < 1 << 63:  # TOML's integers
            found = float(found)
        if type(found) is kind:
            return found
        self._problems.append(f"{key}: expected {kind.__name__}, found {found!r}")
        return default

    def optional(self, key: str) -> float | None:
        """Return a number, or None where there is none."""
        self.kinds[key] = float
        return self.value(key, float, 0.0) if key in self._values else None

    def member(self, key: str, kind: Any, default: Any) -> Any:
        """Take a member of an enum."""
        name = self.value(key, str, default.name.lower())
        by_name = {member.name.lower(): member for member in kind}
        if name in by_name:
            return by_name[name]
        self._problems.append(f"{key}: expected one of {sorted(by_name)}, found {name!r}")
        return default

    def checked(self, make: Callable[[], Any], default: Any) -> Any:
        try:
            return make()
        except Refused as refused:
            self._problems.append(refused.subject)
            return default

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self._problems.append(problem)

    def finish(self, path: Path) -> None:
        unknown = sorted(key for key in self._values if not self._is_known(key))
        known = ", ".join(sorted(self.kinds))
        self._problems += [f"{key}: unknown key; known are {known}" for key in unknown]
        if self._problems:
            raise ConfigError(str(path), "; ".join(self._problems))

    def _is_known(self, key: str) -> bool:
        a_table = self._values[key] == {} and any(k.startswith(f"{key}.") for k in self.kinds)
        return key in self.kinds or a_table


def _flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
