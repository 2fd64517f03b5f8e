"""Graphs kept between builds: they depend on the configuration, not on the weights.

The key covers everything that decides a graph's bytes: the model's configuration, the names and
shapes of its tensors, the adapter, the versions of the exporting libraries and this package's own
source. What is read back is checked again by `parity`, like a fresh export.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from coordinator.plans.dp import clipping_trace
from coordinator.plans.export import export_graphs, export_trace
from coordinator.plans.model import AdaptedModel
from coordinator.plans.traces import traces
from fedloom.graph_contracts import TRAIN_DP_GRAPH

_LIBRARIES = ("onnx", "onnxscript", "peft", "torch", "transformers")
_AFTERWARDS = {"build.py", "files.py", "parity.py", "verification.py"}  # make no graph
# Of this package as it was when it was loaded: a file that changes later makes no graph here.
_SOURCE = [
    [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    for path in sorted(Path(__file__).parent.rglob("*.py"))
    if path.name not in _AFTERWARDS
]
_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_graphs(
    adapted: AdaptedModel, folder: Path | None, report: Callable[[str], None]
) -> dict[str, onnx.ModelProto]:
    """Return the graphs by file name, exported now or by an earlier build; see `export_graphs`."""
    files = [graph.file for trace in traces(adapted) for graph in trace.graphs]
    return _cached(adapted, folder, files, lambda: export_graphs(adapted), report)


def cached_dp_graph(
    adapted: AdaptedModel, folder: Path | None, report: Callable[[str], None]
) -> dict[str, onnx.ModelProto]:
    """Return `train_dp.onnx` by its name, exported now or by an earlier build."""

    def export() -> dict[str, onnx.ModelProto]:
        return export_trace(adapted, clipping_trace(adapted))

    return _cached(adapted, folder, [TRAIN_DP_GRAPH], export, report)


def _cached(
    adapted: AdaptedModel,
    folder: Path | None,
    files: list[str],
    export: Callable[[], dict[str, onnx.ModelProto]],
    report: Callable[[str], None],
) -> dict[str, onnx.ModelProto]:
    names = ", ".join(files)
    if folder is None or adapted.structure is None:
        report(f"exporting {names}")
        return export()
    key = graph_key(adapted, adapted.structure)
    kept = {name: _read(folder / f"{key}.{name}") for name in files}
    graphs = {name: model for name, model in kept.items() if model is not None}
    if len(graphs) == len(kept):
        report(f"from the cache: {names} ({key[:16]})")
        return graphs
    report(f"exporting {names}")
    graphs = export()
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in graphs.items():
        _write(folder / f"{key}.{name}", model)
    return graphs


def graph_key(adapted: AdaptedModel, structure: Mapping[str, object]) -> str:
    """Return a SHA-256 in hexadecimal of all that the graphs depend on."""
    frozen = zip(adapted.frozen, adapted.frozen_tensors(), strict=True)
    facts = {
        "structure": structure,
        "trainable": [[tensor.name, tensor.shape] for tensor in adapted.layout],
        "frozen": [[name, list(tensor.shape)] for name, tensor in frozen],
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "source": _SOURCE,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> onnx.ModelProto | None:
    """Read a kept graph; a damaged file counts as none."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    digest, graph = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(graph).digest() != digest:
        return None
    return onnx.ModelProto.FromString(graph)


def _write(path: Path, model: onnx.ModelProto) -> None:
    graph = model.SerializeToString(deterministic=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(hashlib.sha256(graph).digest() + graph)
    partial.replace(path)
