"""The rounds of `benchmarks.simulation` in Flower's simulation; run by that, with its own Python.

python peer_flower.py HIDDEN CLIENTS ROUNDS MNIST_FILE
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

HIDDEN, CLIENTS, ROUNDS = map(int, sys.argv[1:4])
DATA = Path(sys.argv[4])
ROWS, BATCH, RATE = 60, 10, 0.1
moments = []


def used():
    """Return the CPU seconds of this process and of all below it, so far."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children(recursive=True)))


LOADED = []  # in each actor


def archive():
    """Return all of MNIST, loaded once in each actor."""
    if not LOADED:
        with np.load(DATA) as file:
            LOADED[:] = file["x_train"], file["y_train"].astype(np.int64)
    return LOADED


def rows(index):
    """Return one client's rows."""
    if DATA.exists():
        inputs, labels = archive()
        chosen = np.arange(index * ROWS, (index + 1) * ROWS) % len(inputs)
        return inputs[chosen].reshape(-1, 784).astype(np.float32) / 255, labels[chosen]
    generator = np.random.default_rng(index)
    return generator.random((ROWS, 784), np.float32), generator.integers(0, 10, ROWS)


def network():
    """Return the MLP."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(784, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    )


class Client(NumPyClient):
    """One virtual client."""

    def __init__(self, index):
        self.inputs, self.labels = map(torch.from_numpy, rows(index))

    def fit(self, parameters, config):
        """Train an epoch."""
        torch.set_num_threads(1)
        model, loss = network(), torch.nn.CrossEntropyLoss()
        for parameter, value in zip(model.parameters(), parameters, strict=True):
            parameter.data = torch.from_numpy(value.copy())
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        order = torch.randperm(ROWS)
        for start in range(0, ROWS, BATCH):
            chosen = order[start : start + BATCH]
            optimizer.zero_grad()
            loss(model(self.inputs[chosen]), self.labels[chosen]).backward()
            optimizer.step()
        return [p.detach().numpy() for p in model.parameters()], ROWS, {}


class Timed(FedAvg):
    """FedAvg that remembers when rounds ended."""

    def aggregate_fit(self, server_round, results, failures):
        """See FedAvg."""
        found = super().aggregate_fit(server_round, results, failures)
        if failures or len(results) != CLIENTS:
            raise RuntimeError(f"{len(failures)} failures: {failures[:1]}")
        moments.append((time.perf_counter(), used()))
        return found


def server(context):
    """Return the server's parts."""
    first = ndarrays_to_parameters([p.detach().numpy() for p in network().parameters()])
    strategy = Timed(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=CLIENTS,
        min_available_clients=CLIENTS,
        initial_parameters=first,
    )
    config = ServerConfig(num_rounds=ROUNDS + 1)
    return ServerAppComponents(strategy=strategy, config=config)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(
            client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client()
        ),
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}},
    )
    (began, cpu_before), (ended, cpu_after) = moments[0], moments[-1]
    print(json.dumps({"wall": ended - began, "cpu": cpu_after - cpu_before}))
