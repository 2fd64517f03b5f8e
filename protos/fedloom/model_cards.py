"""The card of an exported model, README.md: what it was made from, how, under which protection.

Facts only: numbers of agents and not their names, measurements and not a row of anyone's data. The
same facts give the same bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from hashlib import sha256

from fedloom.plans import Plan, Role
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.tasks import ArrayLearning, CausalLanguageModelling, Task, task_name
from fedloom.terms import Encoding, LocalTraining

CARD_FILE = "README.md"
CARD_MARK = "<!-- Written by fedloom: the next export to this folder replaces it. -->"
_SHOWN_LABELS = 100
_SHOWN_ROUNDS = 200
_PIPELINES = {
    "text_classification": "text-classification",
    "token_classification": "token-classification",
    "causal_language_modelling": "text-generation",
    "array_learning": "tabular-classification",
}


@dataclass(frozen=True)
class RoundFacts:
    """A round, as agents reported it; None and 0: nobody did."""

    round: int
    participants: int | None  # updates in the sum
    training_loss: float | None = None
    accuracy: float | None = None
    evaluated: int = 0  # rows that the accuracy is of
    loss: float | None = None  # on those rows
    began_with: Mapping[str, float] = field(default_factory=dict)  # mean quality, by metric


@dataclass(frozen=True)
class RunFacts:
    """The run that a model comes from, as far as its exporter knows it."""

    run: str  # hexadecimal
    name: str  # "": not known
    rounds: int  # that the model has learned from; 0: not known
    of: int  # rounds that the run was to have; 0: not known
    privacy: PrivacyTerms
    training: LocalTraining
    encoding: Encoding
    history: tuple[RoundFacts, ...] = ()
    known_by: str = "the coordinator"


def describe(plan: Plan, run: RunFacts | None, software: str) -> str:
    """Return the card's first part, that is true of every form."""
    parts = [_front_matter(plan), CARD_MARK, f"# {_text(plan.name)}", *_plan_lines(plan)]
    if run is None:
        parts += ["## Run", "Not known where this was exported."]
    else:
        parts += [*_run_lines(run)]
    return "\n\n".join([*parts, f"Described by {_text(software)}."]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; every cell is made harmless."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_text(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _front_matter(plan: Plan) -> str:
    """What model hubs read; JSON's strings are YAML's too."""
    task = task_name(plan.task)
    tags = ["federated-learning", "fedloom", *(["lora", "peft"] if plan.origin.lora_rank else [])]
    pipeline = _PIPELINES[task]
    if isinstance(plan.task, ArrayLearning) and not plan.task.labels:
        pipeline = "tabular-regression"
    lines = [
        f"base_model: {json.dumps(plan.origin.base_model)}",
        f"pipeline_tag: {pipeline}",
        f"tags: {json.dumps(tags)}",
    ]
    return "\n".join(["---", *lines, "---"])


def _plan_lines(plan: Plan) -> Iterator[str]:
    origin = plan.origin
    trained = [tensor for tensor in plan.layout if tensor.role is not Role.RESIDUAL]
    rows: list[tuple[str, object]] = [
        ("base model", origin.base_model),
        ("task", task_name(plan.task).replace("_", " ")),
        *_task_rows(plan.task),
        ("frozen weights", plan.base_storage.name.lower()),
        ("trained values", f"{plan.trained_count:,} in {len(trained)} tensors"),
    ]
    if len(trained) < len(plan.layout):
        added = f"{plan.parameter_count - plan.trained_count:,} values"
        rows.append(("added to frozen weights by the server", added))
    if origin.lora_rank:
        frozen = ", A frozen" if origin.lora_a_frozen else ""
        rows += [
            ("LoRA", f"rank {origin.lora_rank}, alpha {origin.lora_alpha:g}{frozen}"),
            ("adapted modules", ", ".join(origin.lora_targets)),
        ]
    rows.append(("plan, SHA-256 of plan.binpb", sha256(plan.encode()).hexdigest()))
    rows += [(f"its {member.name}, SHA-256", member.sha256.hex()) for member in plan.members]
    yield "## Model"
    yield table(("what", "value"), rows)


def _task_rows(task: Task) -> Iterator[tuple[str, object]]:
    if isinstance(task, ArrayLearning):
        inputs = (f"{entry.name} {list(entry.shape)}" for entry in task.inputs)
        yield "inputs of one row", ", ".join(inputs)
        if task.values:
            yield "learned values", task.values
            return
    if isinstance(task, CausalLanguageModelling):
        yield "prompt", task.prompt or "none"
        yield "answer", task.answer
    else:
        more = len(task.labels) - _SHOWN_LABELS
        shown = ", ".join(task.labels[:_SHOWN_LABELS]) + (f" and {more} more" if more > 0 else "")
        yield f"labels ({len(task.labels)})", shown
    if not isinstance(task, ArrayLearning):
        yield "longest text, in tokens", task.max_tokens


def _run_lines(run: RunFacts) -> Iterator[str]:
    of = f" of {run.of}" if run.of else ""
    yield "## Run"
    yield f"As {_text(run.known_by)} knows it. Loss and accuracy are means over what agents report."
    yield table(
        ("what", "value"),
        [
            ("name", run.name or "not known"),
            ("id", run.run),
            ("rounds", f"{run.rounds}{of}" if run.rounds else "not known"),
            ("protection", run.privacy.protection.name.lower()),
            ("sums are released to", f"the {run.privacy.release.name.lower()}"),
            ("fewest updates in a sum", run.privacy.fewest),
            ("bits of a value in an update", run.encoding.update_bits),
            ("range of an update's values", run.encoding.clip or "derived for each cohort"),
        ],
    )
    if run.history:
        yield "### Rounds"
        yield _rounds(run.history)
    yield "### Algorithm and hyper-parameters"
    yield table(("what", "value"), list(_training_rows(run.training)))
    yield "### Who could learn what"
    yield table(("party", "can learn"), list(privacy_statement(run.privacy).lines()))


def _rounds(history: Sequence[RoundFacts]) -> str:
    shown = history[-_SHOWN_ROUNDS:]
    rows = [
        (
            entry.round,
            "not known" if entry.participants is None else entry.participants,
            _number(entry.training_loss),
            _number(entry.accuracy),
            _number(entry.loss),
            entry.evaluated or "none",
            ", ".join(f"{name} {value:.4f}" for name, value in entry.began_with.items())
            or "not known",
        )
        for entry in shown
    ]
    left_out = f"The last {len(shown)} of {len(history)}.\n\n" if len(shown) < len(history) else ""
    columns = (
        *("round", "participants", "training loss", "accuracy", "loss", "on held-out rows"),
        "mean quality of the model that it began with",
    )
    return left_out + table(columns, rows)


def _training_rows(training: LocalTraining) -> Iterator[tuple[str, object]]:
    for entry in fields(training):
        value = getattr(training, entry.name)
        shown = value.name.lower() if isinstance(value, Enum) else str(value)
        yield entry.name.replace("_", " "), shown


def _number(value: float | None) -> str:
    return "not known" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _text(text: str) -> str:
    """Make a text one that Markdown and HTML do nothing with: names and labels are anyone's."""
    visible = "".join(char if char.isprintable() else " " for char in text)
    for char in "\\`*_[]|#":
        visible = visible.replace(char, f"\\{char}")
    return visible.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
