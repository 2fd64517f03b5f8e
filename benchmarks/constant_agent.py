"""An agent process without training: everything but the engine and the export is edge_agent's."""

import argparse
import asyncio
from pathlib import Path

import numpy as np

from edge_agent.checkpoints import Checkpoint
from edge_agent.engine import Evaluation, LocalUpdate, Progress
from edge_agent.identity import load_identity
from edge_agent.participation import Device
from edge_agent.session import Session
from fedloom.adapters import Theta
from fedloom.logs import configure_logs
from fedloom.memory import limit_arenas
from fedloom.plans import Plan
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining, Protection

SAMPLES = 64
LARGEST_VALUE = 1e-3  # within the clip that AdamW's defaults imply


class ConstantEngine:
    """Returns one update, made beforehand."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        del folder
        values = np.random.default_rng(0).random(plan.parameter_count, np.float32)
        values -= np.float32(0.5)
        values *= np.float32(2 * LARGEST_VALUE)
        self._update = LocalUpdate(values, SAMPLES, 0.0)

    def train(
        self,
        theta: Theta,
        terms: LocalTraining,
        order_seed: int,
        progress: Progress,
        checkpoint: Checkpoint,
        linear: Theta | None = None,
        parts: Parts | None = None,
    ) -> LocalUpdate:
        """Return the update."""
        del theta, terms, order_seed, progress, checkpoint, linear, parts
        return self._update

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """Return nothing: this device has no held-out data."""
        return None


def main() -> None:
    """Take part in runs until ended from outside."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("protection", choices=[kind.name.lower() for kind in Protection])
    options = parser.parse_args()
    limit_arenas()
    configure_logs(as_json=True)
    device = Device(
        options.home, load_identity(options.home), Protection.PLAIN, ConstantEngine, None
    )
    protections = frozenset({Protection.PLAIN, Protection[options.protection.upper()]})
    asyncio.run(Session(device, protections).run())


if __name__ == "__main__":
    main()
