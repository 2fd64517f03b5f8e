"""What an operator asks for, and how a build fails. Imports nothing heavy.

FedloomError
├── ConfigError        the request, the model or the installation is not usable
└── PlanExportError    the model cannot be turned into a graph that equals it: `graph`, `problem`
"""

from dataclasses import dataclass

from fedloom.errors import ConfigError, FedloomError
from fedloom.tasks import MAX_LABELS, MAX_TOKENS

MAX_RANK = 4096
MAX_NAME = 128  # characters; plan.proto, Plan.name


@dataclass(frozen=True)
class PlanRequest:
    """A plan to build. Raises ConfigError for values that no model could satisfy.

    `model` is a folder with a Hugging Face model, an installed package that carries one in its
    folder `model`, or a hub id. `targets` are the linear layers that get LoRA, by the end of their
    names. The adapter's product is scaled by `alpha / rank`. `seed` decides the initial LoRA A and
    every value that the checkpoint does not bring, the classification head first of all.
    """

    model: str
    labels: tuple[str, ...]
    name: str = ""  # the model's name when empty
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.labels)
        _require(bool(self.model), "model", "a folder, an installed package or a hub id", "nothing")
        _require(2 <= count <= MAX_LABELS, "labels", f"2..{MAX_LABELS} of them", count)
        _require(len(set(self.labels)) == count, "labels", "distinct ones", self.labels[:8])
        _require(all(self.labels), "labels", "none that is empty", self.labels[:8])
        _require(len(self.name) <= MAX_NAME, "name", f"{MAX_NAME} characters", len(self.name))
        _require(1 <= self.rank <= MAX_RANK, "rank", f"1..{MAX_RANK}", self.rank)
        _require(0 < self.alpha < float("inf"), "alpha", "a positive number", self.alpha)
        _require(bool(self.targets) and all(self.targets), "targets", "names", self.targets)
        limits = f"2..{MAX_TOKENS}"
        _require(2 <= self.max_tokens <= MAX_TOKENS, "max_tokens", limits, self.max_tokens)
        _require(0 <= self.seed < 2**63, "seed", "0..2^63-1", self.seed)


class PlanExportError(FedloomError):
    """The model cannot be exported, or the exported graph does not compute what torch computes."""

    def __init__(self, graph: str, problem: str) -> None:
        super().__init__(f"{graph}: {problem}")
        self.graph = graph
        self.problem = problem


def _require(condition: bool, where: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(where, f"expected {expected}, found {found}")
