"""An exported model: a plan folder's inference half with a trained adapter in it.

The folder holds infer.onnx (and gen.onnx of a causal language model), base.safetensors,
adapter_model.safetensors, adapter_config.json, tokenizer.json and plan.binpb. It needs nothing
else, and any ONNX Runtime can load it: the graphs take theta from the adapter's file. Only that
file differs from what plan.binpb pins. Agents make one after each round; a
coordinator makes one from a run that it can read.
"""

import secrets
import shutil
from pathlib import Path

import numpy as np

from fedloom.adapters import Theta, write_adapter
from fedloom.artifacts import link_or_copy
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
)

INFERENCE_FILES = (INFER_GRAPH, GEN_GRAPH, BASE_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE)
_EXPORTED = frozenset((*INFERENCE_FILES, PLAN_FILE, ADAPTER_FILE))


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
        _swap_in(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_replaceable(out: Path) -> None:
    """Refuse to replace what no export made: a wrong path must not cost a person's files."""
    if not out.exists():
        return
    foreign = [] if not out.is_dir() else [p.name for p in out.iterdir() if p.name not in _EXPORTED]
    if foreign or not out.is_dir():
        raise ConfigError(
            str(out),
            "expected a new folder or an exported model, "
            f"found {f'a folder with {sorted(foreign)[0]!r}' if foreign else 'a file'}",
        )


def _swap_in(partial: Path, out: Path) -> None:
    """Put the finished folder in place; a reader finds the old one, the new one, or for the instant
    between the two renames none, but never a mixture.
    """
    old = partial.with_name(f"{partial.name}.old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
