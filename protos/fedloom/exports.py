"""An exported model: a plan folder's inference half with a trained adapter in it.

The folder holds infer.onnx (and gen.onnx of a causal language model), base.safetensors,
adapter_model.safetensors, adapter_config.json, tokenizer.json and plan.binpb. It needs nothing
else, and any ONNX Runtime can load it: the graphs take theta from the adapter's file. Only that
file differs from what plan.binpb pins. Agents make one after each round; a
coordinator makes one from a run that it can read. `fedloom.export_forms` makes other forms of it.
"""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedloom.adapters import Theta, write_adapter
from fedloom.artifacts import link_or_copy
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH
from fedloom.model_cards import CARD_FILE, CARD_MARK
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
)

INFERENCE_FILES = (INFER_GRAPH, GEN_GRAPH, BASE_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE)
LABELS_FILE = "labels.json"
WEIGHTS_FILE = "weights.safetensors"  # of merged graphs
TRAINED_FILE = "trained.safetensors"
_MERGED = frozenset((INFER_GRAPH, GEN_GRAPH, WEIGHTS_FILE, TOKENIZER_FILE, LABELS_FILE))
_EXPORTED = frozenset((*INFERENCE_FILES, PLAN_FILE, ADAPTER_FILE, LABELS_FILE))
_FORMS = {  # what an export writes into folders of its own
    "merged": _MERGED,
    "merged-int8": _MERGED,
    "peft": frozenset((ADAPTER_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE)),
    "safetensors": frozenset((TRAINED_FILE, TOKENIZER_FILE)),
}


def export_model(plan_folder: Path, plan: Plan, theta: Theta, out: Path) -> None:
    """Make `out` a deployable model of the plan with the trained `theta` (P,) float32.

    Members are hard links where the file system allows: the store replaces files, it never writes
    into them. Replaces an older export; any other folder there is a ConfigError.
    """
    if theta.shape != (plan.parameter_count,) or not np.isfinite(theta).all():
        raise Refused(
            Reason.NOT_FINITE,
            f"expected {plan.parameter_count} finite values to export, found shape {theta.shape}",
        )
    require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        members = {member.name for member in plan.members}
        for name in (PLAN_FILE, *(name for name in INFERENCE_FILES if name in members)):
            link_or_copy(plan_folder / name, partial / name)
        write_adapter(partial / ADAPTER_FILE, plan.layout, theta)
        swap_in(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_replaceable(out: Path) -> None:
    """Refuse to replace what no export made: a wrong path must not cost a person's files."""
    if not out.exists():
        return
    foreign = list(_foreign(out)) if out.is_dir() else []
    if foreign or not out.is_dir():
        raise ConfigError(
            str(out),
            "expected a new folder or an exported model, "
            f"found {f'a folder with {sorted(foreign)[0]!r}' if foreign else 'a file'}",
        )


def _foreign(out: Path) -> Iterator[str]:
    """Yield what in a folder no export of ours has written."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name in _FORMS:
            known = _FORMS[path.name]
            yield from (f"{path.name}/{p.name}" for p in path.iterdir() if p.name not in known)
        elif path.name == CARD_FILE:
            if not path.is_file() or CARD_MARK not in path.read_text(errors="replace"):
                yield path.name
        elif path.is_dir() or path.name not in _EXPORTED:
            yield path.name


def swap_in(partial: Path, out: Path) -> None:
    """Put the finished folder in place; a reader finds the old one, the new one, or for the instant
    between the two renames none, but never a mixture.
    """
    old = partial.with_name(f"{partial.name}.old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
