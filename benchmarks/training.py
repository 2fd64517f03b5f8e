"""Measure training on a device against torch with PEFT, on the same models and rows.

    python -m benchmarks.training [--full] [--plans FOLDER] [--no-install] [--json]

Speed, memory, imports, decoding and disk, each in fresh processes of one thread that take turns.
README.md says what the columns are. Needs the extra `demo`, and a package index unless told not to
install.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from benchmarks.installed import install
from benchmarks.training_models import MODELS, SHAPES, build_plans, write_rows
from benchmarks.training_report import Figures, Measured, report, summary, targets
from fedloom.plans import load_plan

_DECODER = "llama"


def main() -> None:
    """Measure all and print it."""
    options = _options()
    started, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as name:
        figures = measure(Path(name), options)
    if options.json:
        print(json.dumps(_plain(figures)))
        return
    print(report(figures))
    print(f"\n{time.monotonic() - started:.0f} s, load {load[0]:.1f} to {os.getloadavg()[0]:.1f}")


def measure(folder: Path, options: argparse.Namespace) -> Figures:
    """Run every child in turn, as often as wanted."""
    plans = options.plans or folder
    plans.mkdir(parents=True, exist_ok=True)
    build_plans(plans, plans / "graphs")
    repetitions, steps = (5, 9) if options.full else (2, 5)
    data = {model: write_rows(plans, model, SHAPES[model][0] * steps) for model in MODELS}
    rivals = ("product", "product-whole", "torch")
    children = [(rival, model) for model in MODELS for rival in rivals]
    children += [("agent-import", _DECODER), ("product-decode", _DECODER)]
    children += [("torch-decode", _DECODER)]
    clipping = _clipping(plans / "minilm")
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for kind, model in children * repetitions:
        found[kind, model].append(_child(kind, model, plans, data[model]))
    best = {child: summary(every) for child, every in found.items()}
    return Figures(
        training={(model, rival): best[rival, model] for model in MODELS for rival in rivals},
        decoding={who: best[f"{who}-decode", _DECODER] for who in ("product", "torch")},
        agent_import=best["agent-import", _DECODER],
        clipping=clipping,
        download=(_bytes(plans / "minilm"), _bytes(plans / "minilm-int8")),
        installed={} if options.no_install else install(folder),
    )


def _child(kind: str, model: str, plans: Path, data: Path) -> dict[str, float]:
    words = [kind, "--model", model, "--plans", str(plans), "--data", str(data)]
    figures: dict[str, float] = json.loads(_run("benchmarks.training_rivals", words))
    print(model, kind, json.dumps(figures), file=sys.stderr)  # for who waits
    return figures


def _clipping(folder: Path) -> float:
    words = ["--child", "steps", "--plan", str(folder)]
    steps = json.loads(_run("benchmarks.small_devices", words))
    return float(steps["dp_seconds"] / steps["seconds"])


def _run(module: str, words: list[str]) -> str:
    command = [sys.executable, "-m", module, *words]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | one | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # imports are those of an installed package
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"expected {module} {words[0]} to measure, found: {done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def _bytes(folder: Path) -> int:
    return sum(member.size_bytes for member in load_plan(folder).members)


def _plain(figures: Figures) -> dict[str, object]:
    def named(found: object) -> object:
        return asdict(found) if isinstance(found, Measured) else found

    return {
        "training": [
            {"model": model, "who": who, **asdict(one)}
            for (model, who), one in figures.training.items()
        ],
        "decoding": {who: named(one) for who, one in figures.decoding.items()},
        "agent_import": named(figures.agent_import),
        "clipping": figures.clipping,
        "download": figures.download,
        "installed": {way: asdict(one) for way, one in figures.installed.items()},
        "targets": [asdict(target) | {"met": target.met} for target in targets(figures)],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure training against torch with PEFT.")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--full", action="store_true", help="more repetitions and longer ones")
    parser.add_argument("--plans", type=Path, help="folder to keep the plans in, for the next time")
    parser.add_argument("--no-install", action="store_true", help="leave out what it takes on disk")
    return parser.parse_args()


if __name__ == "__main__":
    main()
