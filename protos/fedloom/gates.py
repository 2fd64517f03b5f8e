"""What a model must reach before devices answer with it: the operator's gate, open by default."""

import math
from dataclasses import astuple, dataclass, fields
from typing import Self

from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2


@dataclass(frozen=True)
class ActivationGate:
    """Bounds on a model's quality on held-out data; None asks for nothing.

    Accuracies and drops are shares, losses and rises nats for each label. Raises Refused(MALFORMED)
    for a bound that is out of range.
    """

    minimum_accuracy: float | None = None
    maximum_loss: float | None = None
    maximum_accuracy_drop: float | None = None  # against the model in use
    maximum_loss_rise: float | None = None  # against the model in use

    def __post_init__(self) -> None:
        for field, most in zip(fields(self), (1.0, math.inf, 1.0, math.inf), strict=True):
            bound = getattr(self, field.name)
            if bound is None or (math.isfinite(bound) and 0 <= bound <= most):
                continue
            upto = f"in 0..{most:.0f}" if math.isfinite(most) else "finite and at least 0"
            raise Refused(
                Reason.MALFORMED, f"expected activation.{field.name} {upto}, found {bound}"
            )

    @property
    def is_open(self) -> bool:
        """Whether every model passes, measured or not."""
        return all(bound is None for bound in astuple(self))

    @property
    def compares(self) -> bool:
        """Whether a model is held against the one in use."""
        return not (self.maximum_accuracy_drop is None and self.maximum_loss_rise is None)

    @property
    def bounds_accuracy(self) -> bool:
        """Whether it asks for what only labels have."""
        return not (self.minimum_accuracy is None and self.maximum_accuracy_drop is None)

    @classmethod
    def from_message(cls, message: control_pb2.ActivationGate) -> Self:
        """Validate what a peer sent."""
        return cls(
            message.minimum_accuracy if message.HasField("minimum_accuracy") else None,
            message.maximum_loss if message.HasField("maximum_loss") else None,
            message.maximum_accuracy_drop if message.HasField("maximum_accuracy_drop") else None,
            message.maximum_loss_rise if message.HasField("maximum_loss_rise") else None,
        )

    def to_message(self) -> control_pb2.ActivationGate | None:
        """Return the form that travels; None for an open gate, which does not."""
        if self.is_open:
            return None
        return control_pb2.ActivationGate(
            minimum_accuracy=self.minimum_accuracy,
            maximum_loss=self.maximum_loss,
            maximum_accuracy_drop=self.maximum_accuracy_drop,
            maximum_loss_rise=self.maximum_loss_rise,
        )


OPEN_GATE = ActivationGate()
