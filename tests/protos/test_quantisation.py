"""Integers for weights: bounds of the rounding, and the same bits as ONNX Runtime's operator."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from fedloom.quantisation import (
    BLOCK,
    dequantise_blocks,
    dequantise_rows,
    quantise_blocks,
    quantise_rows,
)

_values = st.floats(-100, 100, width=32).map(lambda value: 0.0 if abs(value) < 1e-20 else value)
_weights = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 3).flatmap(
        lambda blocks: arrays(np.float32, (rows, blocks * BLOCK), elements=_values)
    )
)


@given(_weights)
def test_rows_are_off_by_half_a_level(weights):
    integers, scales = quantise_rows(weights)
    assert integers.dtype == np.int8
    assert integers.min() >= -127
    found = dequantise_rows(integers, scales)
    assert (np.abs(found - weights) <= 0.5001 * scales[:, None]).all()
    again, _ = quantise_rows(found)
    np.testing.assert_array_equal(again, integers)


@given(_weights)
def test_blocks_are_off_by_a_level_and_keep_their_extreme(weights):
    pairs, scales = quantise_blocks(weights)
    assert pairs.shape == (weights.shape[0], weights.shape[1] // 2)
    found = dequantise_blocks(pairs, scales)
    error = np.abs(found - weights).reshape(*scales.shape, BLOCK)
    # The extreme's sign has 8 levels, the other has 7: what lies beyond them is cut.
    assert (error <= 1.0001 * np.abs(scales[..., None])).all()
    extremes = np.abs(weights).reshape(*scales.shape, BLOCK).max(axis=2)
    kept = np.abs(found).reshape(*scales.shape, BLOCK).max(axis=2)
    np.testing.assert_allclose(kept, extremes, rtol=1e-6)


def _onnx_values(element, shape, raw, scales, **attributes):
    """Dequantise by ONNX Runtime: the operator that plans are made of."""
    node = helper.make_node("DequantizeLinear", ["integers", "scales"], ["values"], **attributes)
    integers = TensorProto(name="integers", data_type=element, dims=shape, raw_data=raw)
    output = helper.make_tensor_value_info("values", TensorProto.FLOAT, shape)
    inputs = [helper.make_tensor_value_info("scales", TensorProto.FLOAT, scales.shape)]
    graph = helper.make_graph([node], "one", inputs, [output], [integers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"scales": scales})[0]


@pytest.mark.parametrize("four_bits", [False, True])
def test_onnx_runtime_reads_the_same_bits(four_bits):
    weights = np.random.default_rng(1).standard_normal((7, 3 * BLOCK)).astype(np.float32)
    weights[2] = 0
    if four_bits:
        pairs, scales = quantise_blocks(weights)
        ours = dequantise_blocks(pairs, scales)
        found = _onnx_values(
            onnx.TensorProto.INT4, weights.shape, pairs.tobytes(), scales, axis=1, block_size=BLOCK
        )
    else:
        integers, scales = quantise_rows(weights)
        ours = dequantise_rows(integers, scales)
        found = _onnx_values(
            onnx.TensorProto.INT8, weights.shape, integers.tobytes(), scales, axis=0
        )
    np.testing.assert_array_equal(found, ours)
