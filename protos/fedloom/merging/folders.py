"""Folders of merged graphs: float32 as they come out of the sum, or with integer weights."""

from pathlib import Path

import onnx

from fedloom.adapters import Theta
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH
from fedloom.merging.comparison import Agreement, Bounds, compare
from fedloom.merging.graphs import Merging, looked_up_rows, merge_graph
from fedloom.merging.quantising import quantise_graph
from fedloom.merging.weights import read_constants, write_weights
from fedloom.plans import Plan
from fedloom.tensor_files import Array

GRAPHS = (INFER_GRAPH, GEN_GRAPH)
MERGED_BOUNDS = Bounds(relative_error=1e-4)  # float32 added up in another order stays below 3e-6
# Of tokens drawn at random, whose answers are closer to each other than those of texts.
QUANTISED_BOUNDS = Bounds(relative_error=0.15, same_answer=0.8)


def write_merged(source: Path, plan: Plan, theta: Theta, out: Path) -> Agreement:
    """Write graphs without theta, and their weights, into the folder `out`.

    `source` holds the plan's inference graphs and its base. Raises Refused(PLAN_UNSUPPORTED) when
    the graphs cannot be merged or answer otherwise than with theta.
    """
    shared = Merging(plan, theta)
    models: dict[str, onnx.ModelProto] = {}
    for file in _graphs(source):
        models[file] = onnx.load(source / file, load_external_data=False)
        merge_graph(models[file], read_constants(models[file], source), shared)
    write_weights(models, shared.weights, out)
    found = compare(source, plan, theta, vocabulary_of(source), out)
    MERGED_BOUNDS.check("merged", found)
    return found


def write_quantised(source: Path, plan: Plan, theta: Theta, merged: Path, out: Path) -> Agreement:
    """Write the graphs of `merged` with matrices of 8 bits into the folder `out`.

    Raises Refused(PLAN_UNSUPPORTED) when they answer otherwise than the adapter does.
    """
    weights: dict[str, Array] = {}
    models = {file: quantise_graph(merged / file, weights) for file in _graphs(merged)}
    write_weights(models, weights, out)
    found = compare(source, plan, theta, vocabulary_of(source), out)
    QUANTISED_BOUNDS.check("merged-int8", found)
    return found


def vocabulary_of(source: Path) -> int | None:
    """Return how many token ids the inference graph knows; None when it looks nothing up."""
    model = onnx.load(source / INFER_GRAPH, load_external_data=False)
    return min(looked_up_rows(model), default=None)


def _graphs(folder: Path) -> list[str]:
    return [file for file in GRAPHS if (folder / file).exists()]
