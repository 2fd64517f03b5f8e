"""A Hugging Face classifier with LoRA: where it comes from, what is trained and what is frozen."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers

from coordinator.plans.request import PlanRequest
from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from fedloom.plans import Role, TrainableTensor

HEAD = "classifier"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModelSource:
    """`location` is what transformers loads; `name` stands in files and tells no machine's path."""

    location: str
    name: str


@dataclass(frozen=True)
class AdaptedModel:
    """A model in evaluation mode (no dropout), all of its parameters frozen for torch.

    `trainable` and `frozen` are parameter names of `network`; `layout[i]` is `trainable[i]` under
    PEFT's name for it in a saved adapter, `frozen_names[i]` is `frozen[i]` under the base model's.
    """

    network: torch.nn.Module
    layout: tuple[TrainableTensor, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    frozen_names: tuple[str, ...]
    theta: Theta
    alpha: float

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.network.config

    def frozen_tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the frozen weights in the order of `frozen`; each a distinct tensor object."""
        parameters = dict(self.network.named_parameters())
        return tuple(parameters[name].detach() for name in self.frozen)


def find_model(model: str) -> ModelSource:
    """Return where a model is: a folder, an installed package's folder `model`, or the hub."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return ModelSource(str(folder), folder.resolve().name)
    if folder.exists():
        raise ConfigError("model", f"expected config.json in {model}, found none")
    module = model.replace("-", "_")
    package = importlib.util.find_spec(module) if module.isidentifier() else None
    for place in (package.submodule_search_locations or []) if package else []:
        if (Path(place) / "model" / "config.json").is_file():
            return ModelSource(str(Path(place) / "model"), model)
    return ModelSource(model, model)


def counts_from_padding(network: torch.nn.Module) -> bool:
    """Tell whether positions depend on which tokens are padding, as RoBERTa's and MPNet's do."""
    return _padding_position(network) is not None


def position_limit(network: torch.nn.Module) -> int | None:
    """Return the longest sequence in tokens that the model's position table allows."""
    config: Any = network.config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    padding = _padding_position(network)
    return positions if padding is None else positions - padding - 1


def _padding_position(network: torch.nn.Module) -> int | None:
    """Return the position of padding where real tokens are counted from the one after it."""
    for module in network.modules():
        if hasattr(module, "create_position_ids_from_inputs_embeds"):
            return int(getattr(module, "padding_idx", 0))
    return None


def load_model(request: PlanRequest, source: ModelSource) -> AdaptedModel:
    """Load a checkpoint and give it LoRA and a head, seeded; torch's own generator is untouched."""
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(request.seed)
        classifier, fresh = _load_classifier(source, len(request.labels))
        limit = position_limit(classifier)
        if limit is not None and request.max_tokens > limit:
            raise ConfigError(
                "max_tokens", f"expected at most {limit} for this model, found {request.max_tokens}"
            )
        _check_targets(classifier, request.targets, fresh)
        network = peft.get_peft_model(classifier, lora_config(request, fresh))
    return _describe(network.eval(), request.alpha)


def lora_config(request: PlanRequest, fresh: frozenset[str]) -> Any:
    """Return PEFT's configuration; whatever the checkpoint lacks is trained and saved."""
    return peft.LoraConfig(
        r=request.rank,
        lora_alpha=request.alpha,  # type: ignore[arg-type] # declared int, used as a number
        lora_dropout=0.0,
        target_modules=list(request.targets),
        modules_to_save=[HEAD, *sorted(fresh)],
        task_type="SEQ_CLS",
    )


def _load_classifier(source: ModelSource, label_count: int) -> tuple[Any, frozenset[str]]:
    """Return the model and the modules besides the head whose weights the checkpoint lacks."""
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            source.location,
            num_labels=label_count,
            attn_implementation="eager",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head with another number of labels
            use_safetensors=True,  # never unpickle a checkpoint
            output_loading_info=True,
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(
            "model",
            "expected a folder with a sequence-classification or encoder checkpoint in "
            "safetensors, an installed package that carries one, or a hub id that is in the cache "
            f"or can be reached; {source.name}: {_first_line(error)}",
        ) from error
    lacking = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    parameters = {name for name, _ in model.named_parameters()}
    modules = {name.rpartition(".")[0] for name in lacking & parameters}
    if not hasattr(model, HEAD):
        raise ConfigError(
            "model", f"expected a module called {HEAD} as its head, found {type(model).__name__}"
        )
    return model, frozenset(name for name in modules if name.partition(".")[0] != HEAD)


def _check_targets(model: torch.nn.Module, targets: tuple[str, ...], fresh: frozenset[str]) -> None:
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    adaptable = [name for name in linear if not name.startswith(HEAD) and name not in fresh]
    for target in targets:
        matches = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            raise ConfigError("targets", f"expected some of {', '.join(known)}, found {target}")
        if fresh.intersection(matches):
            raise ConfigError(
                "model",
                f"expected a checkpoint of {type(model).__name__}; it lacks the weights of "
                f"{min(fresh.intersection(matches))}",
            )


def _describe(network: torch.nn.Module, alpha: float) -> AdaptedModel:
    parameters = dict(network.named_parameters())
    trainable = tuple(name for name, p in parameters.items() if p.requires_grad)
    frozen = tuple(name for name in parameters if name not in set(trainable))
    network.requires_grad_(False)
    # Names by storage, so that PEFT's rules for names stay PEFT's.
    saved = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
    saved_names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    layout: list[TrainableTensor] = []
    offset = 0
    for name in trainable:
        tensor = parameters[name]
        saved_name = saved_names[tensor.data_ptr()]
        layout.append(TrainableTensor(saved_name, tuple(tensor.shape), offset, _role(name)))
        offset += tensor.numel()
    return AdaptedModel(
        network=network,
        layout=tuple(layout),
        trainable=trainable,
        frozen=frozen,
        frozen_names=tuple(
            name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".") for name in frozen
        ),
        theta=torch.cat([parameters[name].detach().reshape(-1) for name in trainable]).numpy(),
        alpha=alpha,
    )


def _role(name: str) -> Role:
    """Return what a trainable parameter of PEFT's model is."""
    if ".lora_A." in name:
        return Role.LORA_A
    if ".lora_B." in name:
        return Role.LORA_B
    return Role.HEAD if f".{HEAD}." in name else Role.WEIGHT


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence progress bars and the report of a missing head: here it is always missing."""
    logging: Any = transformers.utils.logging  # half typed
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft still reads attributes that transformers has renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
