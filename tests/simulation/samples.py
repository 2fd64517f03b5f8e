"""A small problem that a small network learns, shared out unequally."""

import numpy as np
import torch

from coordinator import FederatedLearning

FEATURES, CLASSES = 12, 4


def rows(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and the classes that a hidden linear map gives them."""
    weights = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    inputs = np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)
    return inputs, (inputs @ weights).argmax(1)


def network(*, dropout: float = 0.0) -> torch.nn.Module:
    """Return the same network each time."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 16),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(16, CLASSES),
    )


def learning(clients: int = 7, model: torch.nn.Module | None = None, **options: object):
    """Return a federation of clients with 9, 14, 19, ... rows."""
    model = model or network()
    optimizer = options.pop("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    fl = FederatedLearning(model, torch.nn.CrossEntropyLoss(), optimizer, **options)
    for number in range(clients):
        fl.add_client(rows(9 + 5 * number, seed=number + 1))
    return fl


def theta(fl) -> np.ndarray:
    """Return the global model's values, flat."""
    return np.concatenate([p.detach().numpy().ravel() for p in fl.get_global_model().parameters()])
