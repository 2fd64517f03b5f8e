"""Local optimisers on the flat vector of trainable values, in place, in float32.

AdamW: Loshchilov, Hutter, arXiv:1711.05101v3, Algorithm 2 (decoupled weight decay). theta is the
vector of trainable values, g the gradient, m and v the moments, alpha the learning rate. Deviation:
the decay is scaled by alpha, as everyone's implementations do (the paper keeps the two apart).
Adagrad: Duchi, Hazan, Singer, JMLR 12 (2011), the diagonal form of section 1.3, whose delta is
epsilon here; the decay is part of the gradient, as with SGD.

A schedule's factor multiplies alpha, hence AdamW's decay as well; it is not in the moments.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.terms import LocalTraining
from fedloom.terms import Optimizer as Kind

Vector = NDArray[np.float32]  # (P,) in the order of theta
Gradient = Vector


class Optimizer(Protocol):
    """One optimiser with its state, for one round."""

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """What it keeps from step to step, each (P,): the arrays themselves, not copies."""
        ...

    def restore(self, steps: int, vectors: tuple[Vector, ...]) -> None:
        """Go on after so many steps from `vectors`, which it moves from now on."""
        ...

    def step(self, theta: Theta, gradient: Gradient, factor: float = 1.0) -> None:
        """Move `theta` (P,) in place against `gradient` (P,), which stays as it is.

        `factor` is on the learning rate, in this step.
        """
        ...


class AdamW:
    """Adam with decoupled weight decay; keeps three vectors of P float32."""

    def __init__(
        self,
        parameter_count: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._beta1 = beta1
        self._beta2 = beta2
        self._epsilon = epsilon
        self._steps = 0
        self._m = np.zeros(parameter_count, np.float32)
        self._v = np.zeros(parameter_count, np.float32)
        self._scratch = np.empty(parameter_count, np.float32)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """See Optimizer."""
        return self._m, self._v

    def restore(self, steps: int, vectors: tuple[Vector, ...]) -> None:
        """See Optimizer."""
        self._steps = steps
        self._m, self._v = vectors

    def step(self, theta: Theta, gradient: Gradient, factor: float = 1.0) -> None:
        """See Optimizer."""
        self._steps += 1
        learning_rate = self._learning_rate * factor
        m, v, scratch = self._m, self._v, self._scratch
        np.subtract(gradient, m, out=scratch)
        scratch *= 1 - self._beta1
        m += scratch  # m = beta1 m + (1 - beta1) g
        np.multiply(gradient, gradient, out=scratch)
        scratch *= 1 - self._beta2
        v *= self._beta2
        v += scratch  # v = beta2 v + (1 - beta2) g^2
        np.sqrt(v, out=scratch)
        scratch /= math.sqrt(1 - self._beta2**self._steps)
        scratch += self._epsilon
        np.divide(m, scratch, out=scratch)
        scratch *= learning_rate / (1 - self._beta1**self._steps)
        if self._weight_decay:
            theta *= 1 - learning_rate * self._weight_decay
        theta -= scratch


class Sgd:
    """Stochastic gradient descent with heavy-ball momentum; the decay is part of the gradient."""

    def __init__(
        self,
        parameter_count: int,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._velocity = np.zeros(parameter_count if momentum else 0, np.float32)
        self._scratch = np.empty(parameter_count, np.float32)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """See Optimizer."""
        return (self._velocity,) if self._momentum else ()

    def restore(self, steps: int, vectors: tuple[Vector, ...]) -> None:
        """See Optimizer."""
        del steps
        if self._momentum:
            (self._velocity,) = vectors

    def step(self, theta: Theta, gradient: Gradient, factor: float = 1.0) -> None:
        """See Optimizer."""
        scratch = self._scratch
        if self._weight_decay:
            np.multiply(theta, self._weight_decay, out=scratch)
            scratch += gradient
            gradient = scratch
        if self._momentum:
            self._velocity *= self._momentum
            self._velocity += gradient
            gradient = self._velocity
        np.multiply(gradient, self._learning_rate * factor, out=scratch)
        theta -= scratch


class Adagrad:
    """Gradients over the root of the sum of their squares; keeps two vectors of P float32."""

    def __init__(
        self,
        parameter_count: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        epsilon: float = 1e-10,
    ) -> None:
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._epsilon = epsilon
        self._squares = np.zeros(parameter_count, np.float32)
        self._scratch = np.empty(parameter_count, np.float32)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """See Optimizer."""
        return (self._squares,)

    def restore(self, steps: int, vectors: tuple[Vector, ...]) -> None:
        """See Optimizer."""
        del steps
        (self._squares,) = vectors

    def step(self, theta: Theta, gradient: Gradient, factor: float = 1.0) -> None:
        """See Optimizer."""
        scratch = self._scratch
        if self._weight_decay:
            gradient = gradient + np.float32(self._weight_decay) * theta
        np.multiply(gradient, gradient, out=scratch)
        self._squares += scratch
        np.sqrt(self._squares, out=scratch)
        scratch += self._epsilon
        np.divide(gradient, scratch, out=scratch)
        scratch *= self._learning_rate * factor
        theta -= scratch


def optimizer_for(terms: LocalTraining, parameter_count: int) -> Optimizer:
    """Return a fresh optimiser as the run's terms say."""
    match terms.optimizer:
        case Kind.SGD:
            return Sgd(parameter_count, terms.learning_rate, terms.momentum, terms.weight_decay)
        case Kind.ADAMW:
            return AdamW(parameter_count, terms.learning_rate, terms.weight_decay)
        case Kind.ADAGRAD:
            return Adagrad(parameter_count, terms.learning_rate, terms.weight_decay)
