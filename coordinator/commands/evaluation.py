"""A run's model, measured here: by the agent's own command, which knows how data are read.

The coordinator imports nothing of the agent's: it starts `fedloom-agent evaluate` on the exported
model, and needs `fedloom[agent]` beside it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError

_AGENT = "edge_agent.app"


def evaluated(model: Path, data: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return what `fedloom-agent evaluate --json` says; raises ConfigError with its complaint."""
    missing = [name for name in ("onnxruntime", "tokenizers") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "run evaluate",
            f'needs {" and ".join(missing)}, missing here: pip install "fedloom[agent]"',
        )
    command = [sys.executable, "-m", _AGENT, "--json", "--log-level", "error", "evaluate"]
    command += ["--model", str(model), "--data", str(data), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    if done.returncode:
        raise ConfigError(str(data), done.stderr.strip().removeprefix("fedloom-agent: "))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
