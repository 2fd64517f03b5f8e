"""Answer on the device with an exported model, and export one from a plan and a trained adapter.

An exported model is a folder with infer.onnx, base.safetensors, adapter_model.safetensors,
tokenizer.json and plan.binpb. It needs nothing else, and any ONNX Runtime can load it: the graph
takes theta from the adapter's file. Only that file differs from what plan.binpb pins.
"""

import math
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.batches import TokenisedTexts
from edge_agent.graphs import INFER, GraphSession, TextEncoder, batched_logits, log_softmax
from fedloom.adapters import Theta, read_adapter, write_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    INFER_GRAPH,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    load_plan,
)

_LINKED = (INFER_GRAPH, BASE_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE)
_EXPORTED = frozenset((*_LINKED, PLAN_FILE, ADAPTER_FILE))


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text."""

    label: str
    probability: float


class Classifier:
    """Answers with an exported model; loads it once, then serves any number of calls."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """Load the folder; raises Refused(PLAN_MISMATCH, PLAN_UNSUPPORTED or MALFORMED)."""
        self._task = (plan := load_plan(folder)).task
        try:
            self._theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
        except OSError as error:
            raise Refused(
                Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
            ) from error
        self._encoder = TextEncoder(folder, plan)
        self._session = GraphSession(folder, INFER, plan, threads)

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Return one prediction for each text, in their order."""
        labels, pad_token_id = self._task.labels, self._task.pad_token_id
        tokenised = TokenisedTexts.from_ids(self._encoder.ids(texts))
        answers: dict[int, Prediction] = {}
        # The adapter that was checked is fed, so that it is also the one that answers.
        for rows, logits in batched_logits(self._session, self._theta, tokenised, pad_token_id):
            best = logits.argmax(axis=1)  # (B,)
            chosen = np.take_along_axis(log_softmax(logits), best[:, None], axis=1)[:, 0]  # nats
            for row, index, nats in zip(rows.tolist(), best, chosen.tolist(), strict=True):
                answers[row] = Prediction(labels[index], math.exp(nats))
        return [answers[row] for row in range(len(texts))]


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
    _require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        members = {member.name for member in plan.members}
        for name in (PLAN_FILE, *(name for name in _LINKED if name in members)):
            _link_or_copy(plan_folder / name, partial / name)
        write_adapter(partial / ADAPTER_FILE, plan.layout, theta)
        _swap_in(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _require_replaceable(out: Path) -> None:
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


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {source.name} in the plan folder, found none"
        ) from error
    except OSError:  # another device, or a file system without hard links
        shutil.copy2(source, target)


def _swap_in(partial: Path, out: Path) -> None:
    """Put the finished folder in place; a reader finds the old one, the new one, or for the instant
    between the two renames none, but never a mixture.
    """
    old = partial.with_name(f"{partial.name}.old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
