"""Loading a Hugging Face checkpoint: safetensors only, float32, nobody else's code."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
import transformers

from coordinator.plans.sources import ModelSource
from fedloom.errors import ConfigError

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model; `lacking` are its modules of whose weights the checkpoint has none."""

    model: Any
    lacking: frozenset[str]


def load_checkpoint(source: ModelSource, auto: Any, kind: str, **options: object) -> Checkpoint:
    """Load with `auto`, one of transformers' Auto classes; `kind` says in errors what it loads."""
    try:
        model, info = auto.from_pretrained(
            source.location,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,  # never unpickle a checkpoint
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(
            "model",
            f"expected a folder with a {kind} checkpoint in safetensors, an installed package that "
            "carries one, or a hub id that is in the cache or can be reached"
            f"{_offline()}; {source.name}: {_first_line(error)}",
        ) from error
    lacking = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    parameters = {name for name, _ in model.named_parameters()}
    modules = {name.rpartition(".")[0] for name in lacking & parameters}
    return Checkpoint(model, frozenset(modules))


def position_limit(network: torch.nn.Module) -> int | None:
    """Return the longest sequence in tokens that the model's positions or its window allow."""
    config: Any = network.config
    limits = [getattr(config, n, None) for n in ("max_position_embeddings", "sliding_window")]
    # Not every layer type has a window: then it is there and means nothing.
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        limits.pop()
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        return None
    padding = padding_position(network)
    return min(known) if padding is None else min(known) - padding - 1


def padding_position(network: torch.nn.Module) -> int | None:
    """Return the position of padding where real tokens are counted from the one after it.

    RoBERTa and MPNet count so.
    """
    for module in network.modules():
        if hasattr(module, "create_position_ids_from_inputs_embeds"):
            return int(getattr(module, "padding_idx", 0))
    return None


def token_count(wanted: int | None, default: int, network: torch.nn.Module) -> int:
    """Return the length in tokens that texts are cut to; raises ConfigError above the limit."""
    limit = position_limit(network)
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError("max_tokens", f"expected at most {limit} for this model, found {wanted}")
    return wanted or min(default, limit or default)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and the report of a missing head: here it is always missing."""
    logging: Any = transformers.utils.logging  # half typed
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft still reads attributes that transformers has renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            # peft says that it has chosen what it was left to choose: GPT-2's transposed weights.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _offline() -> str:
    switches = [name for name in _OFFLINE if os.environ.get(name, "0").upper() in {"1", "TRUE"}]
    if not switches:
        return ""
    return f" ({switches[0]} is set: unset it to download, or give the folder of a saved model)"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
