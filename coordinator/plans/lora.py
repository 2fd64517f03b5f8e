"""LoRA on a transformers model: what is adapted, what is trained whole, what stays frozen."""

from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers.pytorch_utils import Conv1D

from coordinator.plans.checkpoints import Checkpoint
from coordinator.plans.model import AdaptedModel, Family, frozen_names
from coordinator.plans.request import ALL_LINEAR, PlanRequest
from coordinator.plans.residuals import add_residuals, frozen_name, is_residual, residual_name
from coordinator.plans.sources import ModelSource
from coordinator.plans.tokenization import TextTokenizer
from fedloom.errors import ConfigError
from fedloom.plans import PlanOrigin, Role, TrainableTensor

_PEFT_PREFIX = "base_model.model."
# Names, not structure: two models that differ in these alone have the same graphs.
_NOT_STRUCTURE = {"_name_or_path", "id2label", "label2id", "transformers_version"}


@dataclass(frozen=True)
class Adapted:
    """PEFT's model and where it comes from; `head` is the module that gives the logits."""

    network: Any
    request: PlanRequest
    source: ModelSource
    targets: tuple[str, ...]
    head: str

    def model(self, family: Family, tokenizer: TextTokenizer) -> AdaptedModel:
        """Return the whole as values, with everything frozen for torch."""
        parameters = dict(self.network.named_parameters())
        trained = (name for name, p in parameters.items() if p.requires_grad)
        trainable = tuple(sorted(trained, key=is_residual))  # those behind all others
        frozen = frozen_names(self.network, trainable)
        self.network.requires_grad_(False)
        layout = _layout(self.network, trainable, self.head)
        config: peft.LoraConfig = self.network.peft_config["default"]
        return AdaptedModel(
            network=self.network,
            family=family,
            layout=layout,
            trainable=trainable,
            frozen=frozen,
            frozen_names=tuple(_base_name(name) for name in frozen),
            theta=torch.cat([parameters[name].detach().reshape(-1) for name in trainable]).numpy(),
            origin=PlanOrigin(
                self.source.name,
                self.request.rank,
                self.request.alpha,
                self.targets,
                self.request.freeze_a,
            ),
            structure=_structure(self.network, family, self.request),
            tokenizer=tokenizer,
            adapter_config=_description(config, self.source.name),
        )


def adapt(
    checkpoint: Checkpoint, request: PlanRequest, source: ModelSource, head: str, task_type: str
) -> Adapted:
    """Give a model LoRA; whatever its checkpoint lacks is trained whole and saved.

    torch's generator decides the initial A.
    """
    model = checkpoint.model
    whole = sorted({*request.modules_to_save, *checkpoint.lacking})
    _check_modules(model, request.modules_to_save)
    targets = request.targets or _usual_targets(model)
    _check_targets(model, targets, checkpoint.lacking, head)
    network: Any = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=request.rank,
            lora_alpha=request.alpha,  # type: ignore[arg-type] # declared int, used as a number
            lora_dropout=0.0,
            target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
            modules_to_save=whole or None,
            task_type=task_type,
            # GPT-2 keeps its weights the other way round.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ),
    )
    if request.residual:
        add_residuals(network)
    if request.freeze_a:
        for name, parameter in network.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return Adapted(network.eval(), request, source, targets, head)


def _usual_targets(model: Any) -> tuple[str, ...]:
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    return tuple(usual) if isinstance(usual, list) else (ALL_LINEAR,)


def _check_targets(
    model: torch.nn.Module, targets: tuple[str, ...], lacking: frozenset[str], head: str
) -> None:
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    adaptable = [name for name in linear if not name.startswith(head) and name not in lacking]
    for target in targets if targets != (ALL_LINEAR,) else ():
        matches = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            raise ConfigError(
                "targets", f"expected {ALL_LINEAR} or some of {', '.join(known)}, found {target}"
            )
        if lacking.intersection(matches):
            raise ConfigError(
                "model",
                f"expected a checkpoint of {type(model).__name__}; it lacks the weights of "
                f"{min(lacking.intersection(matches))}",
            )


def _check_modules(model: torch.nn.Module, names: tuple[str, ...]) -> None:
    modules = dict(model.named_modules())
    embeddings = {id(parameter) for parameter in _tied(model)}
    for name in names:
        found = [modules[n] for n in modules if f".{n}".endswith(f".{name}")]
        if not any(p.numel() for module in found for p in module.parameters()):
            known = ", ".join(sorted(n for n, _ in model.named_children()))
            raise ConfigError(
                "modules_to_save", f"expected modules with weights, such as {known}, found {name}"
            )
        if any(id(p) in embeddings for module in found for p in module.parameters()):
            raise ConfigError(
                "modules_to_save",
                f"expected none whose weight is tied to another's, found {name}: a copy that is "
                "trained would leave the other behind",
            )


def _tied(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    seen: dict[int, int] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in every:
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return [parameter for _, parameter in every if seen[id(parameter)] > 1]


def _layout(network: Any, trainable: tuple[str, ...], head: str) -> tuple[TrainableTensor, ...]:
    parameters = dict(network.named_parameters())
    # Names by storage, so that PEFT's rules for names stay PEFT's.
    saved = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
    saved_names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    layout: list[TrainableTensor] = []
    offset = 0
    for name in trainable:
        tensor = parameters[name]
        role = _role(name, head)
        known_as = residual_name(name) if is_residual(name) else saved_names[tensor.data_ptr()]
        layout.append(TrainableTensor(known_as, tuple(tensor.shape), offset, role))
        offset += tensor.numel()
    return tuple(layout)


def _role(name: str, head: str) -> Role:
    """Return what a trainable parameter of PEFT's model is."""
    if ".lora_A." in name:
        return Role.LORA_A
    if ".lora_B." in name:
        return Role.LORA_B
    if is_residual(name):
        return Role.RESIDUAL
    return Role.HEAD if f".{head}." in name else Role.WEIGHT


def _base_name(name: str) -> str:
    """Return the base model's name of a weight, or PEFT's of a frozen part of the adapter."""
    if ".lora_A." in name:
        return name.replace(".default", "")
    return frozen_name(name).removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def _description(config: peft.LoraConfig, base_model: str) -> dict[str, object]:
    described: dict[str, Any] = config.to_dict() | {  # type: ignore[no-untyped-call]
        "base_model_name_or_path": base_model,  # transformers puts the machine's path here
        "inference_mode": True,
    }
    for key in ("modules_to_save", "target_modules"):  # sets come in the order of the day
        if isinstance(described[key], list | set | tuple):
            described[key] = sorted(set(described[key]))
    return described


def _structure(network: Any, family: Family, request: PlanRequest) -> dict[str, object]:
    config = network.config.to_dict()
    return {
        "config": {name: value for name, value in config.items() if name not in _NOT_STRUCTURE},
        "family": type(family).__name__,
        "labels": network.config.num_labels,
        "alpha": request.alpha,
        "loss_pieces": request.loss_pieces,
    }
