"""An agent's process as `fedloom-agent run --once` makes it, but for its engine."""

import asyncio
import sys
from pathlib import Path

from edge_agent.app import _run_session
from edge_agent.identity import load_identity
from edge_agent.model_versions import ModelMaker
from edge_agent.participation import Device
from edge_agent.session import Session
from fedloom.logs import configure_logs
from fedloom.terms import Protection
from tests.integration.engines import FakeEngine


def main(home: Path, samples: int, seconds: float = 0.0) -> int:
    """Take part in one run."""
    configure_logs(as_json=True)
    engine = FakeEngine(samples)
    engine.seconds = seconds
    identity = load_identity(home)
    models = ModelMaker(home / "models", identity.agent_id, identity.identity_key)
    device = Device(home, identity, Protection.ENCRYPTED, lambda folder, plan: engine, models)
    return asyncio.run(_run_session(Session(device, frozenset(Protection)), once=True))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])))
