"""A model with residuals as a PEFT adapter on the unchanged base: what was added, factored.

    R + s B A = B' A'          of a rank that all adapted matrices share, scaled by 1

B' A' is the SVD without what float32 cannot tell from 0, so the product is exact but for rounding,
and no smaller adapter is. After K devices and n rounds the rank is K r n at most, and never more
than a matrix has; such an adapter may be larger than the matrices themselves.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.plans import ADAPTER_CONFIG_FILE, ADAPTER_FILE, Plan, Role, TrainableTensor
from fedloom.strategies.targets import Target, targets_of
from fedloom.tensor_files import Array, write_tensors

_Factors = tuple[NDArray[np.float64], NDArray[np.float64]]  # B' (out, q) and A' (q, in)


def write_factored(source: Path, plan: Plan, theta: Theta, folder: Path) -> None:
    """Write the adapter's two files into `folder`; `source` holds the plan's adapter_config."""
    targets = targets_of(plan.layout)
    pairs = [_factored(plan, theta, target) for target in targets]
    rank = max(1, *(a.shape[0] for _, a in pairs))
    tensors: dict[str, Array] = {
        tensor.name: _values(theta, tensor)
        for tensor in plan.layout
        if tensor.role in (Role.HEAD, Role.WEIGHT)
    }
    for target, (b, a) in zip(targets, pairs, strict=True):
        missing = rank - a.shape[0]
        tensors[target.b.name] = np.pad(b, ((0, 0), (0, missing))).astype(np.float32)
        tensors[target.a.name] = np.pad(a, ((0, missing), (0, 0))).astype(np.float32)
    write_tensors(folder / ADAPTER_FILE, dict(sorted(tensors.items())))
    config = json.loads((source / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": rank}
    text = json.dumps(config, sort_keys=True, indent=2)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _factored(plan: Plan, theta: Theta, target: Target) -> _Factors:
    b, a = (_values(theta, tensor).astype(np.float64) for tensor in (target.b, target.a))
    whole = plan.origin.lora_scale * (b @ a)
    if target.residual is not None:
        whole += _values(theta, target.residual)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    least = np.finfo(np.float32).eps * max(whole.shape) * s[0]
    rank = int((s > least).sum())
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _values(theta: Theta, tensor: TrainableTensor) -> Theta:
    return theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
