"""Every ONNX operator of the torch engine gives what ONNX Runtime gives."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import helper

OPSET, NEW_OPSET = 18, 21
RANDOM = np.random.default_rng(5)


def f32(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def i64(*values: object) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float, dtype: type = np.int64) -> np.ndarray:
    return np.array(value, dtype)


X, Y = f32(2, 3, 4), f32(2, 3, 4)
X.flags.writeable = Y.flags.writeable = False
INTEGERS = np.arange(-6, 6).reshape(3, 4)
TRUTH = np.array([[True, False], [False, True]])
IMAGE = f32(2, 4, 7, 6)


@dataclass(frozen=True)
class Case:
    """One node: its operator, inputs (None is left out) and attributes."""

    operator: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: dict[str, object] = field(default_factory=dict)
    outputs: int = 1
    opset: int = OPSET


def case(operator: str, *inputs: np.ndarray | None, outputs: int = 1, **attributes: object) -> Case:
    return Case(operator, inputs, attributes, outputs)


REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]
CASES = [
    *(
        case(name, X)
        for name in [
            "Abs",
            "Atan",
            "Ceil",
            "Cos",
            "Erf",
            "Exp",
            "Floor",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "IsNaN",
            "Mish",
            "Neg",
            "Reciprocal",
            "Relu",
            "Round",
            "Sigmoid",
            "Sign",
            "Sin",
            "Softplus",
            "Softsign",
            "Tan",
            "Tanh",
            "Elu",
            "LeakyRelu",
            "Size",
            "Dropout",
        ]
    ),
    *(case(name, np.abs(X) + np.float32(0.1)) for name in ("Log", "Sqrt")),
    *(case(name, X, Y) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")),
    *(case(name, X[..., :1], X[0], Y) for name in ("Sum", "Max", "Min")),
    *(
        case(name, INTEGERS, INTEGERS.T.reshape(3, 4))
        for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ),
    *(case(name, TRUTH, TRUTH.T & TRUTH) for name in ("And", "Or", "Xor")),
    case("Not", TRUTH),
    case("Div", INTEGERS, scalar(4)),
    case("Mod", INTEGERS, scalar(4)),
    case("Mod", X, Y, fmod=1),
    case("Pow", np.abs(X), scalar(2.5, np.float32)),
    case("Pow", X, scalar(2)),
    case("Clip", X, scalar(-0.5, np.float32), scalar(0.5, np.float32)),
    case("Clip", X, None, scalar(0.1, np.float32)),
    case("Elu", X, alpha=0.3),
    case("LeakyRelu", X, alpha=0.3),
    case("HardSigmoid", X, alpha=0.3, beta=0.4),
    Case("Gelu", (X,), opset=NEW_OPSET),
    Case("Gelu", (X,), {"approximate": "tanh"}, opset=NEW_OPSET),
    case("Cast", X * 3, to=onnx.TensorProto.INT64),
    case("Cast", INTEGERS, to=onnx.TensorProto.FLOAT),
    case("Cast", INTEGERS, to=onnx.TensorProto.BOOL),
    case("CastLike", INTEGERS, X),
    case("Softmax", X),
    case("Softmax", X, axis=1),
    case("LogSoftmax", X),
    case("LogSoftmax", X, axis=0),
    case("Where", X > 0, X, scalar(7, np.float32)),
    case("MatMul", X, f32(2, 4, 5)),
    case("MatMul", X, f32(4)),
    case("Shape", X),
    case("Shape", X, start=-2),
    case("Shape", X, start=1, end=-1),
    case("Reshape", X, i64(0, -1)),
    case("Reshape", X, i64(4, 6)),
    case("Reshape", f32(0, 3), i64(3, 0), allowzero=1),
    case("Flatten", X),
    case("Flatten", X, axis=2),
    case("Squeeze", X[:, :1], i64(-2)),
    case("Squeeze", X[:, :1]),
    case("Unsqueeze", X, i64(0, -1)),
    case("Unsqueeze", X, i64(2)),
    case("Transpose", X),
    case("Transpose", X, perm=[1, 0, 2]),
    case("Expand", X[:, :1], i64(5, 1, 3, 4)),
    case("Expand", X, i64(1)),
    case("Expand", X[..., :1], i64(3, 6)),
    case("Tile", X, i64(1, 2, 3)),
    case("Concat", X, Y, axis=-2),
    case("Split", X, i64(1, 3), outputs=2, axis=2),
    case("Split", X, outputs=2, axis=1, num_outputs=2),
    case("Slice", X, i64(1), i64(3), i64(-1)),
    case("Slice", X, i64(-2, 0), i64(2**63 - 1, -1), i64(1, 2), i64(1, 2)),
    case("Slice", X, i64(-1), i64(-(2**63)), i64(1), i64(-2)),
    case("Slice", X, i64(1, 0), i64(2, 1)),
    case("Pad", X, i64(0, 1, 2, 1, 0, 3), scalar(9, np.float32)),
    case("Pad", X, i64(2, -1), None, i64(-1)),
    case("Pad", X, i64(0, 0, 1, 0, 0, 2), mode="edge"),
    case("Pad", X, i64(0, 1, 1, 0, 1, 2), mode="reflect"),
    case("Range", scalar(3), scalar(11), scalar(3)),
    case("Range", scalar(1, np.float32), scalar(0, np.float32), scalar(-0.25, np.float32)),
    case("ConstantOfShape", i64(2, 3)),
    case(
        "ConstantOfShape", i64(2), value=helper.make_tensor("v", onnx.TensorProto.INT64, [1], [7])
    ),
    case("Trilu", X),
    case("Trilu", X, scalar(-1), upper=0),
    case("Gather", X, i64([0, -1], [1, 0])),
    case("Gather", X, scalar(-2), axis=-1),
    case("GatherElements", X, INTEGERS[None, :2, :3].clip(-3, 2).repeat(2, 0), axis=1),
    case("GatherND", X, i64([0, -1], [1, 2])),
    case("GatherND", X, i64([0], [-1]), batch_dims=1),
    case("ScatterElements", X, i64([[1, -1, 0, 0]]), f32(1, 1, 4), axis=1),
    *(
        case("ScatterElements", X, i64([[1, 1, 0, 0]]), f32(1, 1, 4), axis=2, reduction=reduction)
        for reduction in ("add", "mul", "max", "min")
    ),
    case("ScatterND", X, i64([0, -1], [1, 0]), f32(2, 4)),
    case("ScatterND", X, i64([0, 1], [0, 1]), f32(2, 4), reduction="add"),
    case("OneHot", i64(0, -1, 5, -100, 2), scalar(3), f32(2)),
    case("OneHot", i64([0, 1], [2, 1]), scalar(3), f32(2), axis=1),
    case("NonZero", TRUTH),
    case("ArgMax", X, axis=-1, keepdims=0),
    case("ArgMax", np.zeros((2, 3), np.float32), axis=1),
    case("ArgMin", X, axis=1),
    case("TopK", X, i64(2), outputs=2),
    case("TopK", X, i64(1), outputs=2, axis=1, largest=0),
    case("CumSum", X, scalar(1)),
    case("CumSum", X, scalar(-1), exclusive=1, reverse=1),
    *(case(name, X, i64(0, -1)) for name in REDUCTIONS if name != "ReduceSum"),
    *(case(name, X, i64(1), keepdims=0) for name in REDUCTIONS),
    *(case(name, X) for name in REDUCTIONS),
    *(case(name, X, noop_with_empty_axes=1) for name in ("ReduceSum", "ReduceMax")),
    case("ReduceSum", INTEGERS, i64(0, 1)),
    case("Gemm", f32(3, 4), f32(4, 5), f32(5)),
    case("Gemm", f32(4, 3), f32(5, 4), f32(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", f32(3, 4), f32(4, 5), alpha=0.5),
    case("Einsum", X, f32(4, 5), equation="bij,jk->bik"),
    case("LayerNormalization", X, f32(4), f32(4)),
    case("LayerNormalization", X, f32(3, 4), axis=1, epsilon=1e-2),
    case("InstanceNormalization", IMAGE, f32(4), f32(4), epsilon=1e-2),
    case("BatchNormalization", IMAGE, f32(4), f32(4), f32(4), np.abs(f32(4)), epsilon=1e-2),
    case("Conv", IMAGE, f32(6, 4, 3, 2), f32(6), pads=[1, 0, 2, 1], strides=[2, 1]),
    case("Conv", IMAGE, f32(4, 2, 2, 2), group=2, dilations=[2, 2]),
    case("Conv", X, f32(5, 3, 2)),
    case("MaxPool", IMAGE, kernel_shape=[3, 2], pads=[1, 0, 0, 1], strides=[2, 2]),
    case("AveragePool", IMAGE, kernel_shape=[3, 2], strides=[2, 2]),
    case("AveragePool", IMAGE, kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    case("GlobalAveragePool", IMAGE),
    case("GlobalMaxPool", IMAGE),
    case("DequantizeLinear", INTEGERS.astype(np.int8), scalar(0.25, np.float32)),
    case(
        "DequantizeLinear",
        INTEGERS.astype(np.int8),
        np.abs(f32(3)),
        np.array([1, 0, -2], np.int8),
        axis=0,
    ),
    case("DequantizeLinear", np.abs(INTEGERS).astype(np.uint8), np.abs(f32(4))),
    Case(
        "DequantizeLinear",
        (INTEGERS.astype(np.int8), np.abs(f32(3, 2)), np.ones((3, 2), np.int8)),
        {"axis": 1, "block_size": 2},
        opset=NEW_OPSET,
    ),
]


def by_onnx_runtime(one: Case, node: onnx.NodeProto) -> list[np.ndarray]:
    import onnxruntime

    given = {f"in{i}": values for i, values in enumerate(one.inputs) if values is not None}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape
        )
        for name, values in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", one.opset)], ir_version=10
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, given)


@pytest.mark.parametrize("one", CASES, ids=[f"{i} {c.operator}" for i, c in enumerate(CASES)])
def test_an_operator_gives_what_onnx_runtime_gives(one: Case) -> None:
    import torch

    from edge_agent.torch_graph import read_operator

    names = [f"in{i}" if v is not None else "" for i, v in enumerate(one.inputs)]
    results = [f"out{i}" for i in range(one.outputs)]
    node = helper.make_node(one.operator, names, results, **one.attributes)
    operator, attributes = read_operator(node, "one.onnx")
    tensors = [None if v is None else torch.tensor(v) for v in one.inputs]
    found = operator.function(attributes, *tensors)
    found = [found] if isinstance(found, torch.Tensor) else found
    for result, expected in zip(found, by_onnx_runtime(one, node), strict=True):
        assert result.numpy().dtype == expected.dtype
        assert tuple(result.shape) == expected.shape
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_every_operator_has_a_case() -> None:
    from edge_agent.torch_operators import OPERATORS

    assert {one.operator for one in CASES} == set(OPERATORS)
