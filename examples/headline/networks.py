"""The network of the classic case, for `--task module`."""

from coordinator.plans import TrainableModule


def digits() -> TrainableModule:
    """Return a small convolutional network on digits of 28 x 28; weights follow from a seed."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    loss = nn.CrossEntropyLoss(reduction="none")
    return TrainableModule(network, loss, {"image": (1, 28, 28)}, tuple("0123456789"), head="7")
