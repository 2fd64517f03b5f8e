"""Frozen weights as small integers, and back: what a plan's base may be stored as.

A matrix is (N, K), as in `base.safetensors`: for a linear layer N are its outputs. Nothing here is
trained: gradients flow through the values that come back.
"""

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # neighbours in a row that share a scale in 4 bits
SCALE_SUFFIX = ".scale"  # of the name of a tensor's scales
_INT8_MAX = 127
_INT4_MIN, _INT4_MAX = -8, 7

Weights = NDArray[np.float32]  # (N, K)


def quantise_rows(weights: Weights) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers (N, K) in -127..127 and a scale for each row (N,).

    weights ≈ integers · scale, off by at most half a scale, which is the row's largest value / 127.
    """
    largest = np.abs(weights).max(axis=1)  # (N,)
    scales = np.where(largest > 0, largest / _INT8_MAX, 1).astype(np.float32)
    return np.rint(weights / scales[:, None]).astype(np.int8), scales


def dequantise_rows(integers: NDArray[np.int8], scales: NDArray[np.float32]) -> Weights:
    """Return what `quantise_rows` stands for, to the bit what DequantizeLinear gives."""
    return integers.astype(np.float32) * scales[:, None]


def quantise_blocks(weights: Weights) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return pairs of 4-bit integers (N, K/2) and a scale for each block of a row (N, K/32).

    The first of a pair is the low half of the byte, both in two's complement. A block's value of
    largest magnitude is -8 times its scale, which may be negative, so that all 16 levels are used.
    """
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // BLOCK, BLOCK)
    place = np.abs(blocks).argmax(axis=2, keepdims=True)
    extremes = np.take_along_axis(blocks, place, axis=2)[..., 0]  # (N, K/32)
    scales = np.where(extremes != 0, extremes / _INT4_MIN, 1).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales[..., None]), _INT4_MIN, _INT4_MAX)
    nibbles = levels.astype(np.int8).view(np.uint8).reshape(rows, columns // 2, 2) & 0xF
    return nibbles[..., 0] | (nibbles[..., 1] << 4), scales


def dequantise_blocks(pairs: NDArray[np.uint8], scales: NDArray[np.float32]) -> Weights:
    """Return what `quantise_blocks` stands for, to the bit what DequantizeLinear gives."""
    nibbles = np.stack([pairs & 0xF, pairs >> 4], axis=-1)  # (N, K/2, 2)
    levels = ((nibbles ^ 8).astype(np.int8) - 8).astype(np.float32)
    blocks = levels.reshape(*scales.shape, BLOCK) * scales[..., None]
    return blocks.reshape(len(pairs), -1)
