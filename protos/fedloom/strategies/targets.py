"""The matrices that LoRA adapts, by a plan's layout: the factors of each, and its residual."""

from dataclasses import dataclass

from fedloom.errors import Reason, Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies.parts import Layout


@dataclass(frozen=True)
class Target:
    """One adapted matrix (out, in): A (r, in), B (out, r), and what is added to its weight."""

    a: TrainableTensor
    b: TrainableTensor
    residual: TrainableTensor | None = None  # (out, in)


def targets_of(layout: Layout) -> tuple[Target, ...]:
    """Return the adapted matrices: the n-th A, B and residual belong together.

    Raises Refused(PLAN_UNSUPPORTED) for factors that have no product, or residuals of other shapes.
    """
    by_role = {role: [tensor for tensor in layout if tensor.role is role] for role in Role}
    residuals: list[TrainableTensor] = by_role[Role.RESIDUAL]
    pairs = list(zip(by_role[Role.LORA_A], by_role[Role.LORA_B], strict=False))
    shapes = [_product_shape(a.shape, b.shape) for a, b in pairs]
    whole = len(by_role[Role.LORA_A]) == len(by_role[Role.LORA_B]) == len(pairs)
    fits = not residuals or [tensor.shape for tensor in residuals] == shapes
    if not (whole and None not in shapes and fits):
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected pairs of LORA_A (r, in) and LORA_B (out, r) in the plan's layout, and a "
            f"RESIDUAL (out, in) for each or none, found {len(by_role[Role.LORA_A])}, "
            f"{len(by_role[Role.LORA_B])} and {len(residuals)} of them",
        )
    rest: list[TrainableTensor | None] = [*residuals] if residuals else [None] * len(pairs)
    return tuple(Target(a, b, residual) for (a, b), residual in zip(pairs, rest, strict=True))


def _product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    fits = len(a) == len(b) == 2 and a[0] == b[1]
    return (b[0], a[1]) if fits else None
