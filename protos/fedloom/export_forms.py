"""A trained model in the forms that people use: graphs, merged weights, PEFT's adapter, tensors.

    OUT/                 form onnx: the exported model of `fedloom.exports`, theta is an input
    OUT/merged/          ONNX graphs with everything trained in their weights
    OUT/merged-int8/     the same with matrices of 8 bits
    OUT/peft/            an adapter for peft.PeftModel.from_pretrained
    OUT/safetensors/     the trained values under their names
    OUT/README.md        the model's card

All of it appears at once, or nothing does. Merging needs onnx and ONNX Runtime, never torch.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fedloom.adapters import Theta, write_adapter
from fedloom.artifacts import link_or_copy
from fedloom.errors import ConfigError
from fedloom.export_factors import write_factored
from fedloom.exports import LABELS_FILE, TRAINED_FILE, export_model, require_replaceable, swap_in
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.model_cards import CARD_FILE, table
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    TOKENIZER_FILE,
    BaseStorage,
    Plan,
    Role,
)
from fedloom.snippets import snippet
from fedloom.tasks import CausalLanguageModelling
from fedloom.tensor_files import Array, read_tensors, write_tensors
from fedloom.version import software


class Form(Enum):
    """How a model is exported."""

    ONNX = "onnx"
    MERGED = "merged"
    MERGED_INT8 = "merged-int8"
    PEFT = "peft"
    SAFETENSORS = "safetensors"


_IS = {
    Form.ONNX: "graphs that answer with the adapter beside them, or with one that they are given",
    Form.MERGED: "graphs with everything trained in their weights",
    Form.MERGED_INT8: "graphs with everything trained in weights of 8 bits",
    Form.PEFT: "an adapter for peft.PeftModel.from_pretrained",
    Form.SAFETENSORS: "the trained values under their names",
}


@dataclass(frozen=True)
class TrainedModel:
    """What is exported: `folder` holds the plan's inference half, `theta` (P,) goes into it."""

    folder: Path
    plan: Plan
    theta: Theta
    description: str  # the card's first part

    @property
    def has_residual(self) -> bool:
        """Whether a server has added anything to the frozen weights."""
        return bool(self.theta[self.plan.trained_count :].any())


@dataclass(frozen=True)
class Exported:
    """What an export wrote: sizes by path within its folder, and what comparisons found."""

    forms: tuple[Form, ...]
    files: dict[str, int]
    compared: dict[str, str]  # by form

    def lines(self, out: Path) -> Iterator[str]:
        """Yield what to tell a person."""
        for form in self.forms:
            where = out if form is Form.ONNX else out / form.value
            found = self.compared.get(form.value)
            yield f"{where}: {_IS[form]}{f' ({found})' if found else ''}"
        yield f"{out / CARD_FILE}: what this model is, and how it is loaded"


def read_forms(given: Iterable[str]) -> tuple[Form, ...]:
    """Read `--form`, which may be repeated and may hold several between commas; none: onnx."""
    names = [name.strip() for text in given for name in text.split(",")] or [Form.ONNX.value]
    known = [form.value for form in Form]
    for name in names:
        if name not in known:
            raise ConfigError("--form", f"expected some of {', '.join(known)}, found {name!r}")
    return tuple(form for form in Form if form.value in names)


def require_installed(forms: Iterable[Form]) -> None:
    """Import what the forms need; raises ConfigError that names the extra."""
    if not {Form.MERGED, Form.MERGED_INT8}.intersection(forms):
        return
    try:
        import fedloom.merging  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--form merged",
            f'{error.name} is not installed: pip install "fedloom[export]"',
        ) from error


def export_forms(model: TrainedModel, forms: tuple[Form, ...], out: Path) -> Exported:
    """Make `out` a folder of the model in these forms, with its card.

    Replaces an older export; any other folder there is a ConfigError. Raises
    Refused(PLAN_UNSUPPORTED) when a merged model does not answer as the adapter does.
    """
    require_installed(forms)
    if Form.PEFT in forms and not model.plan.origin.lora_rank:
        raise ConfigError("--form peft", "expected a plan with LoRA, found one that trains weights")
    require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        found = _write_forms(model, forms, partial)
        (partial / CARD_FILE).write_text(_card(model, forms, found, partial), encoding="utf-8")
        files = {
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        swap_in(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(forms, files, found)


def _write_forms(model: TrainedModel, forms: tuple[Form, ...], out: Path) -> dict[str, str]:
    """Write the forms, those that others are made from first; return what was compared."""
    found: dict[str, str] = {}
    if Form.ONNX in forms:
        export_model(model.folder, model.plan, model.theta, out)
        _write_labels(model.plan, out)
    out.mkdir(exist_ok=True)
    if Form.MERGED in forms or Form.MERGED_INT8 in forms:
        merged = out / Form.MERGED.value
        found[Form.MERGED.value] = _write_merged(model, merged)
        if Form.MERGED_INT8 in forms:
            quantised = out / Form.MERGED_INT8.value
            found[Form.MERGED_INT8.value] = _write_quantised(model, merged, quantised)
        if Form.MERGED not in forms:
            shutil.rmtree(merged)
            del found[Form.MERGED.value]
    writers: dict[Form, Callable[[TrainedModel, Path], None]] = {
        Form.PEFT: _write_peft,
        Form.SAFETENSORS: _write_safetensors,
    }
    for form, write in writers.items():
        if form in forms:
            write(model, _folder(model, out / form.value))
    return found


def _write_merged(model: TrainedModel, folder: Path) -> str:
    from fedloom.merging import write_merged

    model.plan.member(INFER_GRAPH)  # or it is refused here
    _write_labels(model.plan, _folder(model, folder))
    return str(write_merged(model.folder, model.plan, model.theta, folder))


def _write_quantised(model: TrainedModel, merged: Path, folder: Path) -> str:
    from fedloom.merging import write_quantised

    _write_labels(model.plan, _folder(model, folder))
    return str(write_quantised(model.folder, model.plan, model.theta, merged, folder))


def _folder(model: TrainedModel, folder: Path) -> Path:
    """Make a form's folder, with the tokenizer of a model of text."""
    folder.mkdir()
    if any(member.name == TOKENIZER_FILE for member in model.plan.members):
        link_or_copy(model.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    return folder


def _write_labels(plan: Plan, folder: Path) -> None:
    if isinstance(plan.task, CausalLanguageModelling):
        return
    if plan.task.labels:
        text = json.dumps(plan.task.labels, ensure_ascii=False, indent=1)
        (folder / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def _write_peft(model: TrainedModel, folder: Path) -> None:
    """Write PEFT's adapter whole: also the A that was frozen and lies in the plan's base.

    PEFT knows no residual: a model that has one is written at the rank that has room for it.
    """
    if model.has_residual:
        write_factored(model.folder, model.plan, model.theta, folder)
        return
    link_or_copy(model.folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_CONFIG_FILE)
    tensors: dict[str, Array] = {
        tensor.name: model.theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        for tensor in model.plan.layout
        if tensor.role is not Role.RESIDUAL
    }
    needed = {
        tensor.name.replace(".lora_B.", ".lora_A.")
        for tensor in model.plan.layout
        if tensor.role is Role.LORA_B
    }
    if missing := sorted(needed - set(tensors)):
        base = read_tensors(model.folder / BASE_FILE)
        tensors |= {name: base[name] for name in missing}
    write_tensors(folder / ADAPTER_FILE, dict(sorted(tensors.items())))


def _write_safetensors(model: TrainedModel, folder: Path) -> None:
    write_adapter(folder / TRAINED_FILE, model.plan.layout, model.theta)


def _card(model: TrainedModel, forms: tuple[Form, ...], found: dict[str, str], out: Path) -> str:
    parts = [model.description.rstrip(), "## Forms"]
    for form in forms:
        parts.append(f"### {form.value}")
        if form.value in found:
            parts.append(
                "Compared with the adapter's own answers, on inputs drawn at random: "
                f"{found[form.value]}."
            )
        if form is Form.PEFT and model.plan.base_storage is not BaseStorage.FP32:
            parts.append(
                f"Trained on weights stored as {model.plan.base_storage.name.lower()}: on the base "
                "model's own it answers a little otherwise. The form `merged` does not."
            )
        if form is Form.ONNX and model.has_residual:
            parts.append(
                "PEFT leaves the residuals out of this adapter, with which it is another model: "
                "for PEFT there is the form `peft`."
            )
        if form is Form.PEFT and model.has_residual:
            parts.append(
                "The server has added to the adapted weights (LoRA rules flora, fedex). What it "
                "added is factored into this adapter, whose rank is therefore higher than the one "
                "that was trained."
            )
        parts.append(f"```python\n{snippet(model.plan, form.value)}\n```")
    parts += ["## Files", table(("file", "bytes", "SHA-256"), list(_file_rows(out)))]
    return "\n\n".join([*parts, f"Exported by {software()}."]) + "\n"


def _file_rows(out: Path) -> Iterable[tuple[str, int, str]]:
    for path in sorted(out.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield path.relative_to(out).as_posix(), path.stat().st_size, digest
