"""The build: load, export, write, compare with torch, and only then appear at its place."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from coordinator.plans import files, parity
from coordinator.plans.base_file import float_base
from coordinator.plans.cache import cached_dp_graph, cached_graphs
from coordinator.plans.families import load_model
from coordinator.plans.memory import Feeds, training_memory
from coordinator.plans.model import AdaptedModel
from coordinator.plans.onnx_rewrite import attach_weights, used_weights
from coordinator.plans.quantised import quantise
from coordinator.plans.request import PlanRequest
from fedloom.errors import ConfigError
from fedloom.plans import PLAN_FILE, BaseStorage, Plan, TrainingMemory
from fedloom.tasks import ArrayLearning

Report = Callable[[str], None]


def build(request: PlanRequest, out: Path, report: Report, cache: Path | None) -> Plan:
    """Build a plan; see `coordinator.plans.build_plan`."""
    with _appearing_at(out) as folder:
        report(f"loading {request.model}")
        adapted = load_model(request)
        count, residuals = adapted.trained_count, len(adapted.theta) - adapted.trained_count
        report(f"{count:,} trainable values in {adapted.trained_tensors} tensors")
        if residuals:
            report(f"{residuals:,} values of residuals, {4 * residuals / 1e6:.1f} MB in every sum")
        graphs = cached_graphs(adapted, cache, report)
        if request.dp:
            graphs |= cached_dp_graph(adapted, cache, report)
        _write_model(folder, adapted, graphs, request.base)
        report("comparing the graphs with torch")
        report(f"equal to torch within: {parity.check_graphs(folder, adapted)}")
        plan = Plan(
            name=request.name or adapted.origin.base_model,
            members=tuple(files.member(folder, path.name) for path in sorted(folder.iterdir())),
            layout=adapted.layout,
            task=adapted.task,
            origin=adapted.origin,
            base_storage=request.base,
            training_memory=_memory(folder, adapted),
        )
        (folder / PLAN_FILE).write_bytes(plan.encode())
    megabytes = sum(entry.size_bytes for entry in plan.members) / 1e6
    report(f"plan {plan.name} is ready: {len(plan.members)} members, {megabytes:.1f} MB")
    return plan


def _write_model(
    folder: Path, adapted: AdaptedModel, graphs: dict[str, onnx.ModelProto], storage: BaseStorage
) -> None:
    used = set[str]().union(*(used_weights(graph) for graph in graphs.values()))
    if storage is BaseStorage.FP32:
        base = float_base(adapted, used)
    else:
        base = quantise(adapted, graphs, storage, used)
    base.write(folder)
    files.write_adapter_files(folder, adapted)
    files.write_tokenizer(folder, adapted)
    for name, graph in graphs.items():
        attach_weights(graph, base, adapted.layout)
        (folder / name).write_bytes(graph.SerializeToString(deterministic=True))


def _memory(folder: Path, adapted: AdaptedModel) -> TrainingMemory:
    def example(batch: int, sequence: int) -> Feeds:
        tensors = adapted.family.example(batch, sequence, seed=0)
        return {"theta": adapted.theta, **{name: t.numpy() for name, t in tensors.items()}}

    longest = 1 if isinstance(adapted.task, ArrayLearning) else adapted.task.max_tokens
    return training_memory(folder, example, longest)


@contextmanager
def _appearing_at(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that takes its place at the end, or vanishes on an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("out", f"expected a new or an empty folder, found {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # already gone when it took its place
