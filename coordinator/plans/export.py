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
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from coordinator.plans.graphs import (
    example_batch,
    example_shape,
    training_step,
)
from coordinator.plans.model import AdaptedModel
from coordinator.plans.onnx_rewrite import (
    FROZEN,
    fold_transposes,
    keep_outputs,
    normalise,
    read_batch_from_tokens,
)
from coordinator.plans.request import PlanExportError
from fedloom.graph_contracts import (
    Axis,
    GraphContract,
    eval_contract,
    infer_contract,
    train_contract,
)
from fedloom.tasks import Task

OPSET = 18  # with IR 8, runtimes from 2023 on load the graph (ONNX Runtime >= 1.16)
IR_VERSION = 8
_OPERATOR = re.compile(r"aten(?:::|\.)[A-Za-z_][\w.]*|prims(?:::|\.)[A-Za-z_][\w.]*")

_aten = torch.ops.aten
# Backward operators that torch.onnx lacks or gets wrong (nll_loss), written as forward ones.
_DECOMPOSED = (
    _aten._log_softmax_backward_data,
    _aten._softmax_backward_data,
    _aten.elu_backward,
    _aten.embedding_dense_backward,
    _aten.gelu_backward,
    _aten.hardswish_backward,
    _aten.hardtanh_backward,
    _aten.leaky_relu_backward,
    _aten.native_layer_norm_backward,
    _aten.nll_loss_backward,
    _aten.nll_loss_forward,
    _aten.select_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    _aten.slice_backward,
    _aten.tanh_backward,
    _aten.threshold_backward,
)


def export_graphs(adapted: AdaptedModel, task: Task) -> dict[str, onnx.ModelProto]:
    """Return all graphs by file name; each frozen weight that one uses is an input `frozen::NAME`.

    One trace serves all: inference is what remains of a training step when only its logits are
    asked for. Raises PlanExportError that names the operator or module which cannot be exported.
    """
    contracts = graph_contracts(task, len(adapted.theta))
    train, infer = contracts[0], contracts[-1]
    whole = _convert(adapted, train, [*train.outputs, *infer.outputs])
    fold_transposes(whole.graph)
    read_batch_from_tokens(whole.graph)
    graphs = {}
    for spec in contracts:
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        keep_outputs(model.graph, spec)
        normalise(model, spec)
        model.ir_version = IR_VERSION
        graphs[spec.file] = model
    return graphs


def graph_contracts(task: Task, parameter_count: int) -> tuple[GraphContract, ...]:
    """Return the contracts of a plan's graphs: the whole training step first, inference last."""
    return tuple(
        contract(task, parameter_count)
        for contract in (train_contract, eval_contract, infer_contract)
    )


def _convert(adapted: AdaptedModel, spec: GraphContract, outputs: list[str]) -> onnx.ModelProto:
    frozen = adapted.frozen_tensors()
    batch = example_batch(adapted, *example_shape(adapted), seed=0)
    arguments = (torch.from_numpy(adapted.theta), *batch.values(), *frozen)
    # make_fx tells its inputs apart by identity.
    assert len({id(tensor) for tensor in arguments}) == len(arguments)  # noqa: S101
    dynamic = [_dynamic_axes(port.axes) for port in spec.inputs.values()] + [None] * len(frozen)
    with _errors_named(spec.file, "traced"):
        traced = make_fx(
            training_step(adapted),
            tracing_mode="symbolic",
            decomposition_table=get_decompositions(_DECOMPOSED),  # type: ignore[arg-type] # its type
            _allow_non_fake_inputs=True,
        )(*arguments)
    with _errors_named(spec.file, "exported with dynamic shapes"):
        program = torch.export.export(
            traced, arguments, dynamic_shapes=tuple(dynamic), strict=False
        )
    with _errors_named(spec.file, "converted to ONNX"):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[*spec.inputs, *(FROZEN + name for name in adapted.frozen_names)],
            output_names=outputs,
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
