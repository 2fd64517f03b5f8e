"""Client updates per second of simulated rounds: ours, a loop by hand, and peers where installed.

    python -m benchmarks.simulation [--clients 100] [--rounds 10] [--hidden 32,200]
                                    [--peers VENV/bin/python] [--peer-rounds 2] [--json]

An MLP 784-hidden-10 on MNIST (`../shared/data/mnist/mnist.npz`; random rows where it is absent), 60
rows per client, batches of 10, one epoch of SGD 0.1, FedAvg, every client in every round, nothing
evaluated. Times are of whole rounds, after one to warm up. `by hand` is what there is to compute:
copies of the module, torch's SGD, a running weighted sum, one thread.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator import FederatedLearning

ROWS, BATCH, RATE = 60, 10, 0.1
DATA = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "mnist.npz"
PEERS = ("flower", "pfl")
PEER_SECONDS = 300
Rows = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def rows(count: int) -> Rows:
    """Return so many inputs (N, 784) and labels; MNIST's, as far as it goes."""
    if DATA.exists():
        with np.load(DATA) as archive:
            inputs, labels = archive["x_train"], archive["y_train"].astype(np.int64)
        chosen = np.arange(count) % len(inputs)
        return inputs[chosen].reshape(count, 784).astype(np.float32) / 255, labels[chosen]
    generator = np.random.default_rng(0)
    return generator.random((count, 784), np.float32), generator.integers(0, 10, count)


def network(hidden: int) -> torch.nn.Module:
    """Return the MLP."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(784, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
    )


def by_hand(hidden: int, clients: list[Rows]) -> Callable[[], None]:
    """Return a round as a page of torch."""
    model, loss = network(hidden), torch.nn.CrossEntropyLoss()
    tensors = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in clients]

    def conduct() -> None:
        torch.set_num_threads(1)
        total = [torch.zeros_like(p) for p in model.parameters()]
        for inputs, labels in tensors:
            local = copy.deepcopy(model)
            optimizer = torch.optim.SGD(local.parameters(), RATE)
            order = torch.randperm(len(labels))
            for start in range(0, len(labels), BATCH):
                chosen = order[start : start + BATCH]
                optimizer.zero_grad()
                loss(local(inputs[chosen]), labels[chosen]).backward()
                optimizer.step()
            for into, parameter in zip(total, local.parameters(), strict=True):
                into += parameter.detach() / len(tensors)
        for parameter, mean in zip(model.parameters(), total, strict=True):
            parameter.data = mean

    return conduct


def ours(
    hidden: int, clients: list[Rows], rounds: int, workers: int, vectorise: bool
) -> tuple[float, float]:
    """Return seconds, of the wall and of this process's and its workers' CPU, for these rounds."""
    fl = FederatedLearning(
        network(hidden),
        torch.nn.CrossEntropyLoss(),
        "sgd",
        terms={"training": {"batch_size": BATCH, "learning_rate": RATE}},
        workers=workers,
        vectorise=vectorise,
    )
    for data in clients:
        fl.add_client(data)
    fl.train(1)
    return timed(lambda: fl.train(rounds))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds of wall and of CPU, children included that ended."""
    cpu, wall = os.times(), time.perf_counter()
    work()
    wall, now = time.perf_counter() - wall, os.times()
    return wall, sum(now[:4]) - sum(cpu[:4])


def peer(name: str, python: str, hidden: int, clients: int, rounds: int) -> dict[str, Any]:
    """Run a peer's script with its own interpreter; it prints seconds as JSON on its last line."""
    script = Path(__file__).with_name(f"peer_{name}.py")
    command = [python, str(script), str(hidden), str(clients), str(rounds), str(DATA)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_SECONDS, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        tail = "" if isinstance(error, subprocess.TimeoutExpired) else done.stderr[-300:]
        return {"problem": f"{type(error).__name__}: {tail}"}
    return found


def measure(
    hidden: int, count: int, rounds: int, python: str, peer_rounds: int
) -> list[dict[str, Any]]:
    """Return a line for each way to conduct such rounds."""
    inputs, labels = rows(count * ROWS)
    clients = [
        (inputs[start : start + ROWS], labels[start : start + ROWS])
        for start in range(0, len(labels), ROWS)
    ]
    conduct, lines = by_hand(hidden, clients), []

    def told(way: str, wall: float, cpu: float, of: int = rounds) -> None:
        updates = count * of
        lines.append(
            {
                "hidden": hidden,
                "way": way,
                "updates_per_second": round(updates / wall, 1),
                "updates_per_cpu_second": round(updates / cpu, 1),
            }
        )

    conduct()
    told("by hand, 1 thread", *timed(lambda: [conduct() for _ in range(rounds)]))
    for vectorise in (False, True):
        for workers in (1, 2):
            way = f"ours, {'vectorised' if vectorise else 'one by one'}, {workers} process(es)"
            told(way, *ours(hidden, clients, rounds, workers, vectorise))
    for name in PEERS if python else ():
        found = peer(name, python, hidden, count, peer_rounds)
        if "problem" in found:
            lines.append({"hidden": hidden, "way": name, **found})
        else:
            told(name, found["wall"], found["cpu"], peer_rounds)
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Client updates per second.")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--hidden", default="32,200")
    parser.add_argument("--peers", default="", help="Python of an environment with flwr and pfl.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = "MNIST" if DATA.exists() else "random rows"
    load = os.getloadavg()[0]
    print(f"{where}, {os.cpu_count()} cores, load {load:.1f} before", file=sys.stderr)
    for hidden in map(int, options.hidden.split(",")):
        for line in measure(
            hidden, options.clients, options.rounds, options.peers, options.peer_rounds
        ):
            if options.json:
                print(json.dumps(line), flush=True)
            elif "problem" in line:
                print(f"{hidden:>4}  {line['way']:36} {line['problem']}", flush=True)
            else:
                print(
                    f"{hidden:>4}  {line['way']:36} {line['updates_per_second']:>9} per second "
                    f"{line['updates_per_cpu_second']:>9} per CPU second",
                    flush=True,
                )


if __name__ == "__main__":
    main()
