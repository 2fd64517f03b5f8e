"""Modules that plans are built from: what a user's own file would hold."""

import torch
from torch import nn

from coordinator.plans import TrainableModule


def squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ((logits - labels) ** 2).mean(-1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


class TwoInputs(nn.Module):
    """A regression on two arrays, one of which goes through a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.first.requires_grad_(False)
        self.second = nn.Linear(5, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, features: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.first(features) * self.second(more)))


def mlp() -> TrainableModule:
    shapes = {"features": (6,), "more": (5,)}
    return TrainableModule(TwoInputs(), squared_error, shapes, values=2, head="out")


def cnn() -> TrainableModule:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, groups=2, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8 * 3 * 3, 5),
    )
    nn.init.normal_(network[1].running_mean)
    nn.init.uniform_(network[1].running_var, 0.5, 2.0)
    return TrainableModule(
        network, cross_entropy, {"image": (1, 28, 28)}, labels=tuple("abcde"), head="9"
    )


def unused() -> TrainableModule:
    network = nn.Linear(3, 2)
    network.extra = nn.Parameter(torch.zeros(1))
    return TrainableModule(network, squared_error, {"x": (3,)}, values=2)


def one_loss() -> TrainableModule:
    return TrainableModule(nn.Linear(3, 2), nn.functional.mse_loss, {"x": (3,)}, values=2)


def wrong_width() -> TrainableModule:
    return TrainableModule(nn.Linear(3, 4), squared_error, {"x": (3,)}, values=2)


def nothing() -> None:
    """Return something else."""


def layers() -> TrainableModule:
    """Return convolutions and linear layers that follow one another, and nothing else."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 9),
        nn.Tanh(),
        nn.Linear(9, 3),
    )
    return TrainableModule(
        network, cross_entropy, {"image": (1, 14, 14)}, labels=tuple("abc"), head="8"
    )


class Residual(nn.Module):
    """Layers whose names and shapes are a chain's, and a connection around one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(features))
        return self.out(hidden + torch.tanh(self.second(hidden)))


def residual() -> TrainableModule:
    return TrainableModule(Residual(), squared_error, {"features": (5,)}, values=2, head="out")
