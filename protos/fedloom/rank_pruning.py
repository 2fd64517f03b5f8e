"""A trained adapter at a lower rank: the nearest one there is (Eckart and Young, 1936).

    B A = U S V^T,   B' = U sqrt(S),   A' = sqrt(S) V^T        of the first r' singular values

No adapter of rank r' is nearer to B A in the Frobenius norm. Both factors begin with what counts
most, so that lower ranks of the result are its own truncations. In theta, whose length the graphs
fix, ranks beyond r' are zero; PEFT's form leaves them out.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from fedloom.export_forms import TrainedModel
from fedloom.plans import Plan, Role
from fedloom.strategies.tails import pairs_of

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Pruned:
    """An adapter of a lower rank, and the share of the products that is lost: their norms'."""

    theta: Theta
    lost: float


def pruned(model: TrainedModel, rank: int) -> TrainedModel:
    """Return the model at this rank, with a word of it in its card.

    Raises ConfigError for a plan without both factors in theta, or of no higher rank.
    """
    if model.has_residual:
        raise ConfigError("--rank", "expected a model without a residual, whose rank is not A's")
    found = pruned_theta(model.plan, model.theta, rank)
    said = (
        f"Pruned from rank {model.plan.origin.lora_rank} to {rank}: the products B A differ from "
        f"those that were trained by {found.lost:.2%} of their norm."
    )
    description = f"{model.description.rstrip()}\n\n{said}\n"
    return replace(model, theta=found.theta, rank=rank, description=description)


def pruned_theta(plan: Plan, theta: Theta, rank: int) -> Pruned:
    """Return theta at this rank; see `pruned`."""
    roles = {tensor.role for tensor in plan.layout}
    if not {Role.LORA_A, Role.LORA_B} <= roles:
        raise ConfigError("--rank", "expected a plan that trains A and B of an adapter")
    pairs = pairs_of(plan.layout)
    most = max(pair.rank for pair in pairs)
    if not 1 <= rank <= most:
        raise ConfigError("--rank", f"expected 1..{most}, found {rank}")
    kept, whole, lost = theta.copy(), 0.0, 0.0
    for pair in pairs:
        a, b = pair.a(theta).astype(np.float64), pair.b(theta).astype(np.float64)
        near_b, near_a, values = nearest(b, a, rank)
        pair.a(kept)[:], pair.b(kept)[:] = 0, 0
        pair.a(kept)[: len(near_a)], pair.b(kept)[:, : len(near_a)] = near_a, near_b
        whole += float(np.sum(values**2))
        lost += float(np.sum(values[rank:] ** 2))
    return Pruned(kept, float(np.sqrt(lost / whole)) if whole else 0.0)


def nearest(b: Float64, a: Float64, rank: int) -> tuple[Float64, Float64, Any]:
    """Return factors (out, rank) and (rank, in), and all singular values of B A.

    Of two thin factorisations and one of (r, r): never of (out, in).
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, values, v = np.linalg.svd(r_b @ r_a.T)
    roots = np.sqrt(values[:rank])
    count = len(roots)
    return (q_b @ u[:, :count]) * roots, (v[:count] @ q_a.T) * roots[:, None], values
