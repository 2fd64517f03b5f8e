"""What an operator asks for, and how a build fails. Imports nothing heavy.

FedloomError
├── ConfigError        the request, the model or the installation is not usable
└── PlanExportError    the model cannot be turned into a graph that equals it: `graph`, `problem`
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from fedloom.errors import ConfigError, FedloomError
from fedloom.plans import BaseStorage
from fedloom.tasks import MAX_LABELS, MAX_TEMPLATE, MAX_TOKENS, template_fields

MAX_RANK = 4096
MAX_LOSS_PIECES = 64
MAX_NAME = 128  # characters; plan.proto, Plan.name
ALL_LINEAR = "all-linear"

CLASSIFICATION = "classification"
NER = "ner"
CAUSAL_LM = "causal-lm"
MODULE = "module"
_LORA = ("rank", "alpha", "targets", "modules_to_save", "freeze_a", "residual")
# What each task takes besides a model, a name and a seed.
_TAKEN = {
    CLASSIFICATION: ("labels", "max_tokens", *_LORA),
    NER: ("labels", "max_tokens", *_LORA),
    CAUSAL_LM: ("prompt", "answer", "max_tokens", "loss_pieces", *_LORA),
    MODULE: (),
}


@dataclass(frozen=True)
class PlanRequest:
    """A plan to build. Raises ConfigError for values that no model could satisfy.

    `model` is a folder with a Hugging Face model, an installed package that carries one in its
    folder `model`, or a hub id; for the task `module` it is `package.module:factory`, a function
    that returns a TrainableModule. `targets` are the linear layers that get LoRA, by the end of
    their names, or `all-linear`; none are PEFT's choice for the architecture. The adapter's product
    is scaled by `alpha / rank`. `modules_to_save` are trained whole. `freeze_a` keeps LoRA's A at
    its random start (FFA-LoRA, arXiv:2403.12313). `residual` gives every adapted weight one of its
    own size, which FLoRA and FedEx-LoRA move. `prompt` and `answer` are the templates of
    CausalLanguageModelling; `loss_pieces` cut its head and loss in training, where logits need most
    of a step's memory. `seed` decides the initial LoRA A and every value that the checkpoint
    does not bring, the classification head first of all. With `dp` the plan has `train_dp.onnx`, an
    export of its own: it takes as long as the others together. `base` is how the frozen matrices
    are stored.
    """

    model: str
    labels: tuple[str, ...] = ()
    task: str = CLASSIFICATION
    name: str = ""  # the model's name when empty
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    freeze_a: bool = False
    residual: bool = False
    max_tokens: int | None = None  # the task's default, or the model's limit where that is lower
    prompt: str = ""
    answer: str = "{text}"
    loss_pieces: int = 1
    seed: int = 0
    dp: bool = False
    base: BaseStorage = BaseStorage.FP32

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", "a folder, an installed package or a hub id", "nothing")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        require_taken(self.task, [n for n in fields if getattr(self, n) != fields[n]])
        if "labels" in _TAKEN[self.task]:
            self._check_labels()
        self._check_adapter()
        _require(len(self.name) <= MAX_NAME, "name", f"{MAX_NAME} characters", len(self.name))
        pieces = self.loss_pieces
        _require(1 <= pieces <= MAX_LOSS_PIECES, "loss_pieces", f"1..{MAX_LOSS_PIECES}", pieces)
        _require(0 <= self.seed < 2**63, "seed", "0..2^63-1", self.seed)
        tokens, limits = self.max_tokens, f"2..{MAX_TOKENS}"
        _require(tokens is None or 2 <= tokens <= MAX_TOKENS, "max_tokens", limits, tokens)
        for where, template in (("prompt", self.prompt), ("answer", self.answer)):
            most = f"{MAX_TEMPLATE} characters"
            _require(len(template) <= MAX_TEMPLATE, where, most, len(template))
        columns = template_fields(self.answer)
        _require(bool(columns), "answer", "a {COLUMN} that is learned", repr(self.answer[:80]))

    def _check_labels(self) -> None:
        count = len(self.labels)
        _require(2 <= count <= MAX_LABELS, "labels", f"2..{MAX_LABELS} of them", count)
        _require(len(set(self.labels)) == count, "labels", "distinct ones", self.labels[:8])
        _require(all(self.labels), "labels", "none that is empty", self.labels[:8])

    def _check_adapter(self) -> None:
        _require(1 <= self.rank <= MAX_RANK, "rank", f"1..{MAX_RANK}", self.rank)
        _require(0 < self.alpha < float("inf"), "alpha", "a positive number", self.alpha)
        if self.residual and self.freeze_a:
            raise ConfigError(
                "residual",
                "expected none with freeze_a: with an A that never moves the mean of products has "
                "no residual",
            )
        targets = self.targets
        named = targets is None or (bool(targets) and all(targets))
        _require(named, "targets", f"names, or {ALL_LINEAR}", targets)
        alone = targets is None or ALL_LINEAR not in targets or len(targets) == 1
        _require(alone, "targets", f"names, or {ALL_LINEAR} alone", targets)
        saved = self.modules_to_save
        _require(all(saved), "modules_to_save", "names", saved)


class PlanExportError(FedloomError):
    """The model cannot be exported, or the exported graph does not compute what torch computes."""

    def __init__(self, graph: str, problem: str) -> None:
        super().__init__(f"{graph}: {problem}")
        self.graph = graph
        self.problem = problem


def require_taken(task: str, options: Iterable[str]) -> None:
    """Refuse options that plans of a task do not have; raises ConfigError(the option)."""
    _require(task in _TAKEN, "task", f"one of {', '.join(_TAKEN)}", task[:64])
    optional = {option for taken in _TAKEN.values() for option in taken}
    for option in options:
        if option in optional and option not in _TAKEN[task]:
            taken = ", ".join(_TAKEN[task]) or "no options of its own"
            raise ConfigError(
                option, f"expected none for the task {task} (it takes {taken}), found one"
            )


def _require(condition: bool, where: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(where, f"expected {expected}, found {found}")
