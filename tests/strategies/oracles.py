"""The papers' algorithms, slowly, in float64: written from the formulas, with none of our code.

Each oracle is a whole federation: `round(movements)` is told what the sampled clients moved, from
where they were told to start, and moves the server. Symbols are the papers'.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass
class Client:
    """What one sampled client did: x_i - x, n_i, and for SGD its ||a_i||_1 and eta_l."""

    movement: Float64
    samples: int = 1
    steps: float = 1.0
    rate: float = 1.0
    index: int = 0


def weighted(values: list[Float64], weights: list[float]) -> Float64:
    """sum_k (n_k / n) x_k, one after another."""
    total = np.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total = total + (weight / sum(weights)) * value
    return total


@dataclass
class FedAvgM:
    """arXiv:1909.06335v1, section 3.2: v <- beta v + Delta w; w <- w - v."""

    w: Float64
    beta: float
    eta: float
    v: Float64 | float = 0.0

    def round(self, clients: list[Client]) -> None:
        models = [self.w + client.movement for client in clients]
        delta = self.w - weighted(models, [client.samples for client in clients])
        self.v = self.beta * self.v + delta
        self.w = self.w - self.eta * self.v


@dataclass
class FedOpt:
    """arXiv:2003.00295v5, Algorithm 2."""

    x: Float64
    kind: str
    beta_1: float
    beta_2: float
    tau: float
    eta: float
    m: Float64 | float = 0.0
    v: Float64 = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.v = np.full(len(self.x), self.tau**2)

    def round(self, clients: list[Client]) -> None:
        delta = weighted([c.movement for c in clients], [c.samples for c in clients])
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * delta
        if self.kind == "adagrad":
            self.v = self.v + delta**2
        elif self.kind == "yogi":
            self.v = self.v - (1 - self.beta_2) * delta**2 * np.sign(self.v - delta**2)
        else:
            self.v = self.beta_2 * self.v + (1 - self.beta_2) * delta**2
        self.x = self.x + self.eta * self.m / (np.sqrt(self.v) + self.tau)


@dataclass
class FedNova:
    """arXiv:2007.07481v1, section 5: x <- x - tau_eff sum_i p_i eta d_i."""

    x: Float64

    def round(self, clients: list[Client]) -> None:
        n = sum(client.samples for client in clients)
        p = [client.samples / n for client in clients]
        tau_eff = sum(p_i * client.steps for p_i, client in zip(p, clients, strict=True))
        eta_d = [-client.movement / client.steps for client in clients]
        total = np.zeros_like(self.x)
        for p_i, d_i in zip(p, eta_d, strict=True):
            total = total + p_i * d_i
        self.x = self.x - tau_eff * total


@dataclass
class Scaffold:
    """arXiv:1910.06378v4, Algorithm 1 with option II; `population` is N."""

    x: Float64
    population: int
    eta_g: float
    c: Float64 = field(default_factory=lambda: np.zeros(0))
    c_i: list[Float64] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.c = np.zeros_like(self.x)
        self.c_i = [np.zeros_like(self.x) for _ in range(self.population)]

    def correction(self, index: int) -> Float64:
        """What line 10 adds to a client's gradient."""
        return self.c - self.c_i[index]

    def round(self, clients: list[Client]) -> None:
        delta_y, delta_c = [], []
        for client in clients:
            y_i, before = self.x + client.movement, self.c_i[client.index]
            after = before - self.c + (self.x - y_i) / (client.steps * client.rate)
            delta_y.append(y_i - self.x)
            delta_c.append(after - before)
            self.c_i[client.index] = after
        self.x = self.x + self.eta_g / len(clients) * np.sum(delta_y, axis=0)
        self.c = self.c + np.sum(delta_c, axis=0) / self.population


@dataclass
class FedDyn:
    """arXiv:2111.04263v2, Algorithm 1; `population` is m."""

    theta: Float64
    population: int
    alpha: float
    h: Float64 = field(default_factory=lambda: np.zeros(0))
    gradients: list[Float64] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.h = np.zeros_like(self.theta)
        self.gradients = [np.zeros_like(self.theta) for _ in range(self.population)]

    def correction(self, index: int) -> Float64:
        """The gradient of -<g_k, theta>."""
        return -self.gradients[index]

    def round(self, clients: list[Client]) -> None:
        models = []
        for client in clients:
            theta_k = self.theta + client.movement
            self.gradients[client.index] = self.gradients[client.index] - self.alpha * (
                theta_k - self.theta
            )
            models.append(theta_k)
        drift = np.sum([model - self.theta for model in models], axis=0)
        self.h = self.h - self.alpha / self.population * drift
        self.theta = np.mean(models, axis=0) - self.h / self.alpha
