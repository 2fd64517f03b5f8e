"""The rounds of `benchmarks.simulation` in pfl-research; run by that, with its own Python.

python peer_pfl.py HIDDEN CLIENTS ROUNDS MNIST_FILE
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

HIDDEN, CLIENTS, ROUNDS = map(int, sys.argv[1:4])
DATA = Path(sys.argv[4])
ROWS, BATCH, RATE = 60, 10, 0.1
moments = []


class Network(torch.nn.Module):
    """The MLP, with the loss that pfl asks of a model."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(784, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
        )

    def forward(self, inputs):
        """Return logits."""
        return self.layers(inputs)

    def loss(self, inputs, targets, eval=False):
        """Return the mean loss."""
        self.train(not eval)
        return torch.nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=True):
        """Measure nothing."""
        return {}


class Timer(TrainingProcessCallback):
    """Remembers when rounds ended."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """See TrainingProcessCallback."""
        moments.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def rows():
    """Return all clients' rows, (N, 784) and (N,)."""
    if DATA.exists():
        with np.load(DATA) as archive:
            inputs, labels = archive["x_train"], archive["y_train"].astype(np.int64)
        chosen = np.arange(CLIENTS * ROWS) % len(inputs)
        return inputs[chosen].reshape(-1, 784).astype(np.float32) / 255, labels[chosen]
    generator = np.random.default_rng(0)
    return generator.random((CLIENTS * ROWS, 784), np.float32), generator.integers(
        0, 10, CLIENTS * ROWS
    )


def main():
    """Run and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, labels = map(torch.from_numpy, rows())

    def held(user):
        part = slice(user * ROWS, (user + 1) * ROWS)
        return Dataset(raw_data=[inputs[part], labels[part]], user_id=str(user))

    users = get_user_sampler("minimize_reuse", list(range(CLIENTS)))
    network = Network()
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=ROUNDS + 1,
            evaluation_frequency=1_000,
            train_cohort_size=CLIENTS,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=FederatedDataset(held, users), val_data=None, postprocessors=[]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=ROWS),
        callbacks=[Timer()],
    )
    (began, cpu_before), (ended, cpu_after) = moments[0], moments[-1]
    print(json.dumps({"wall": ended - began, "cpu": cpu_after - cpu_before}))


if __name__ == "__main__":
    main()
