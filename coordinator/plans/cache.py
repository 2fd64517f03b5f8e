"""Graphs kept between builds: they depend on the configuration, not on the weights.

The key covers everything that decides a graph's bytes: the model's configuration, the names and
shapes of its tensors, the adapter, the versions of the exporting libraries and this package's own
source. What is read back is checked again by `parity`, like a fresh export.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx

from coordinator.plans.export import export_graphs, graph_contracts
from coordinator.plans.model import AdaptedModel
from fedloom.tasks import Task

_LIBRARIES = ("onnx", "onnxscript", "peft", "torch", "transformers")
_SOURCES = ("export.py", "graphs.py", "model.py", "onnx_rewrite.py")
# Names, not structure: two models that differ in these alone have the same graphs.
_NOT_STRUCTURE = {"_name_or_path", "id2label", "label2id", "transformers_version"}
_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_graphs(
    adapted: AdaptedModel, task: Task, folder: Path | None, report: Callable[[str], None]
) -> dict[str, onnx.ModelProto]:
    """Return the graphs by file name, exported now or by an earlier build; see `export_graphs`."""
    if folder is None:
        report("exporting the graphs")
        return export_graphs(adapted, task)
    key = graph_key(adapted)
    files = [contract.file for contract in graph_contracts(task, len(adapted.theta))]
    kept = {name: _read(folder / f"{key}.{name}") for name in files}
    graphs = {name: model for name, model in kept.items() if model is not None}
    if len(graphs) == len(kept):
        report(f"graphs from the cache: {key[:16]}")
        return graphs
    report("exporting the graphs")
    graphs = export_graphs(adapted, task)
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in graphs.items():
        _write(folder / f"{key}.{name}", model)
    return graphs


def graph_key(adapted: AdaptedModel) -> str:
    """Return a SHA-256 in hexadecimal of all that the graphs depend on."""
    config = adapted.config.to_dict()
    parameters = dict(adapted.network.named_parameters())
    here = Path(__file__).parent
    facts = {
        "config": {name: v for name, v in config.items() if name not in _NOT_STRUCTURE},
        "alpha": adapted.alpha,
        "labels": adapted.config.num_labels,
        "trainable": [[tensor.name, tensor.shape] for tensor in adapted.layout],
        "frozen": [[name, list(parameters[name].shape)] for name in adapted.frozen],
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "source": [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in _SOURCES],
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
