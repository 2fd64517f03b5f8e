"""Bytes of an update beside what the model learns: `python -m benchmarks.compression`.

A small network on digits, trained by simulated agents whose labels are skewed, under each way to
send less. Bytes are those of real encodings of such an update; accuracy is on rows that no agent
has. `--data` names an .npz with x_train, y_train, x_test and y_test (28 x 28 bytes); without it
rows are generated. Nothing passes or fails.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import crypto
from coordinator import FederatedLearning
from crypto.masks import Mask
from fedloom.compression import Compression, chosen_count

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]
PIXELS, HIDDEN, CLASSES, AGENTS = 784, 64, 10, 10


@dataclass(frozen=True)
class Case:
    """A way to send less; `rank`: of the first layer, 0 for a full one."""

    name: str
    protection: str = "sealed"
    update_bits: int = 16
    compression: dict[str, Any] = field(default_factory=dict)
    rank: int = 0


def mask(share: float, **options: Any) -> dict[str, Any]:
    """Return a table of run.toml."""
    return {"kind": "random_mask", "share": share, **options}


CASES = (
    Case("all values, 16 bits"),
    Case("all values, 8 bits", update_bits=8),
    Case("random mask 0.25", compression=mask(0.25)),
    Case("random mask 0.25, 8 bits", update_bits=8, compression=mask(0.25)),
    Case("random mask 0.25, feedback", compression=mask(0.25, error_feedback=True)),
    Case("random mask 0.25, not scaled", compression=mask(0.25, unbiased=False)),
    Case("random mask 0.1", compression=mask(0.1)),
    Case("random mask 0.1, feedback", compression=mask(0.1, error_feedback=True)),
    Case("random mask 0.1, not scaled", compression=mask(0.1, unbiased=False)),
    Case("rank 16", rank=16),
    Case("rank 8", rank=8),
    Case("rank 4", rank=4),
    Case("all values", "plain"),
    Case("quantised", "plain", compression={"kind": "quantised"}),
    Case("top-k 0.1, feedback", "plain", compression={"kind": "top_k"}),
    Case("top-k 0.1", "plain", compression={"kind": "top_k", "error_feedback": False}),
    Case("top-k 0.01, feedback", "plain", compression={"kind": "top_k", "share": 0.01}),
    Case("random mask 0.1", "plain", compression=mask(0.1)),
)


def network(rank: int) -> torch.nn.Module:
    """Return the same network for the same rank."""
    torch.manual_seed(0)
    first: list[torch.nn.Module] = [torch.nn.Linear(PIXELS, HIDDEN)]
    if rank:
        first = [torch.nn.Linear(PIXELS, rank, bias=False), torch.nn.Linear(rank, HIDDEN)]
    return torch.nn.Sequential(*first, torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))


def digits(path: Path, train: int, test: int) -> tuple[Rows, Rows]:
    """Return rows to learn and rows to try, drawn by chance."""
    with np.load(path) as archive:
        parts = [(archive[f"x_{part}"], archive[f"y_{part}"]) for part in ("train", "test")]
    random, found = np.random.default_rng(0), []
    for (images, labels), count in zip(parts, (train, test), strict=True):
        chosen = random.permutation(len(images))[:count]
        inputs = images[chosen].reshape(count, PIXELS).astype(np.float32) / 255
        found.append((inputs, labels[chosen].astype(np.int64)))
    return found[0], found[1]


def generated(train: int, test: int) -> tuple[Rows, Rows]:
    """Return rows around ten centres."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 0.25, (CLASSES, PIXELS))
    found = []
    for count in (train, test):
        labels = random.integers(0, CLASSES, count)
        inputs = (centres[labels] + random.normal(0, 1, (count, PIXELS))).astype(np.float32)
        found.append((inputs, labels))
    return found[0], found[1]


def shared_out(rows: Rows) -> Iterator[Rows]:
    """Yield each agent's rows: half of them of two labels of its own, the rest of any."""
    inputs, labels = rows
    random = np.random.default_rng(1)
    own, mixed = np.split(random.permutation(len(labels)), 2)
    own = own[np.argsort(labels[own], kind="stable")]
    pairs = zip(np.array_split(own, AGENTS), np.array_split(mixed, AGENTS), strict=True)
    for two, any_label in pairs:
        chosen = np.concatenate([two, any_label])
        yield inputs[chosen], labels[chosen]


def encoded_bytes(case: Case, length: int) -> int:
    """Return the size of an encoded update of `length` values before what is left out."""
    kind, share = case.compression.get("kind", "none"), case.compression.get("share", 0.1)
    count = chosen_count(share, length)
    masked = kind == Compression.RANDOM_MASK.name.lower()
    sealed = case.protection == "sealed"
    context = crypto.UpdateContext(
        bytes(16),
        1,
        1,
        count if masked else length,
        AGENTS,
        1 << 10,
        clip=1.0,
        update_bits=case.update_bits,
        cohort=bytes(32 if sealed else 0),
        listed=count if kind == "top_k" else 0,
        quantised=kind == "quantised",
    )
    protection = crypto.protection("sealed" if sealed else "plain")
    key = crypto.generate_run_key() if sealed else None
    masks = [Mask(bytes(32))] if sealed else None
    encoder = protection.encoder(context, 0, key, np.random.default_rng(0), masks)
    update = np.zeros(context.parameter_count, np.float32)
    return sum(len(part) for part in encoder.encode(update, 1))


def learnt(
    case: Case, agents: list[Rows], test: Rows, asked: argparse.Namespace
) -> tuple[float, float, int]:
    """Return the accuracy halfway and at the end, and how many values the model has."""
    rounds = asked.rounds
    model = network(case.rank)
    fl = FederatedLearning(
        model,
        torch.nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), lr=asked.learning_rate),
        protection=case.protection,
        terms={
            "training": {"batch_size": 32, "epochs": asked.epochs},
            "protection": {"update_bits": case.update_bits},
            "compression": case.compression,
        },
        held_out=test,
    )
    for rows in agents:
        fl.add_client(rows)
    done = fl.train(rounds)
    scores = [one.evaluation.correct / one.evaluation.count for one in done if one.evaluation]
    return scores[rounds // 2 - 1], scores[-1], sum(p.numel() for p in model.parameters())


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print a table of all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    asked = parser.parse_args()
    train, test = (
        generated(asked.rows, 2000) if asked.data is None else digits(asked.data, asked.rows, 2000)
    )
    agents = list(shared_out(train))
    halfway = asked.rounds // 2
    write("| sent | protection | values | bytes up, agent and round | of the first row's | ")
    write(f"accuracy after {halfway} | after {asked.rounds} | s |\n")
    write("|---|---|---:|---:|---:|---:|---:|---:|\n")
    whole = 0
    for case in CASES:
        if asked.only not in case.name:
            continue
        begun = time.monotonic()
        half, last, length = learnt(case, agents, test, asked)
        size = encoded_bytes(case, length)
        whole = whole or size
        cells = f"| {case.name} | {case.protection} | {length:,} | {size:,} | {size / whole:.0%} "
        write(f"{cells}| {half:.1%} | {last:.1%} | {time.monotonic() - begun:.0f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
