"""From a torch function to an ONNX graph whose weights are still loose inputs.

Autograd inside the function, then `make_fx`, `torch.export` and `torch.onnx`: the one route of
those tried that keeps gradients and dynamic shapes (README.md, "Routes").
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import onnx
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from coordinator.plans.decompositions import decompositions
from coordinator.plans.graphs import Trace, traces
from coordinator.plans.model import AdaptedModel
from coordinator.plans.onnx_rewrite import (
    FROZEN,
    fold_transposes,
    keep_outputs,
    normalise,
    read_extents_from_inputs,
)
from coordinator.plans.request import PlanExportError
from fedloom.graph_contracts import Axis

OPSET = 18  # with IR 8, runtimes from 2023 on load the graph (ONNX Runtime >= 1.16)
IR_VERSION = 8
_OPERATOR = re.compile(r"aten(?:::|\.)[A-Za-z_][\w.]*|prims(?:::|\.)[A-Za-z_][\w.]*")


def export_graphs(adapted: AdaptedModel) -> dict[str, onnx.ModelProto]:
    """Return all graphs by file name; each frozen weight that one uses is an input `frozen::NAME`.

    One trace serves several: inference is what remains of a training step when only its logits are
    asked for. Raises PlanExportError that names the operator or module which cannot be exported.
    """
    graphs = {}
    for trace in traces(adapted):
        whole = _convert(adapted, trace)
        fold_transposes(whole.graph)
        read_extents_from_inputs(whole.graph)
        for contract in trace.graphs:
            model = onnx.ModelProto()
            model.CopyFrom(whole)
            keep_outputs(model.graph, contract)
            normalise(model, contract)
            model.ir_version = IR_VERSION
            graphs[contract.file] = model
    return graphs


def _convert(adapted: AdaptedModel, trace: Trace) -> onnx.ModelProto:
    file = trace.graphs[0].file
    frozen = adapted.frozen_tensors()
    arguments = (*trace.example.values(), *frozen)
    # make_fx tells its inputs apart by identity.
    assert len({id(tensor) for tensor in arguments}) == len(arguments)  # noqa: S101
    dynamic = [_dynamic_axes(port.axes) for port in trace.inputs.values()] + [None] * len(frozen)
    with _errors_named(file, "traced"):
        traced = make_fx(
            trace.step,
            tracing_mode="symbolic",
            decomposition_table=decompositions(),
            _allow_non_fake_inputs=True,
        )(*arguments)
    with _errors_named(file, "exported with dynamic shapes"):
        program = torch.export.export(
            traced, arguments, dynamic_shapes=tuple(dynamic), strict=False
        )
    with _errors_named(file, "converted to ONNX"):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[*trace.inputs, *(FROZEN + name for name in adapted.frozen_names)],
            output_names=trace.outputs,
            opset_version=OPSET,
        )
    assert converted is not None  # noqa: S101 - dynamo=True returns a program
    model: onnx.ModelProto = converted.model_proto
    return model


def _dynamic_axes(axes: tuple[Axis, ...]) -> dict[int, object] | None:
    """Let torch find the relation between extents; parity at other shapes proves that it did."""
    varying = {i: torch.export.Dim.AUTO for i, axis in enumerate(axes) if isinstance(axis, str)}
    return dict(varying) or None


@contextmanager
def _errors_named(graph: str, stage: str) -> Iterator[None]:
    """Turn whatever torch raises into one sentence, and silence its remarks on its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch's exporters raise classes of a dozen modules
        raise PlanExportError(graph, f"cannot be {stage}: {_diagnosis(error)}") from error
    finally:
        logger.setLevel(level)


def _diagnosis(error: BaseException) -> str:
    """Name the module and the operator at the root of an export error."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = f"{error}\n{root}"
    operators = _OPERATOR.findall(text)
    module = _failing_module(root.__traceback__) or _failing_module(error.__traceback__)
    where = [f"operator {operators[0]}"] if operators else []
    where += [f"module {module}"] if module else []
    first_line = next(iter(str(root).strip().splitlines()), "")[:200]
    return f"{', '.join([*where, type(root).__name__])}: {first_line}"


def _failing_module(traceback: TracebackType | None) -> str | None:
    """Return the innermost module of the model that was running."""
    found = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        outside_torch = not type(owner).__module__.startswith("torch.")
        if isinstance(owner, torch.nn.Module) and outside_torch:
            found = type(owner).__name__
        traceback = traceback.tb_next
    return found
