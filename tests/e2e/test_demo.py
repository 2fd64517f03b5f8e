"""The README's first command, on a part of its data: real model, real processes, real keys."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime as ort
import psutil
import pytest

from edge_agent.inference import load_exported
from fedloom.plans import ADAPTER_FILE, PLAN_FILE

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples" / "home_assistant"
LABELS = ("lights_on", "set_timer", "start_vacuum", "weather_forecast")
pytestmark = [pytest.mark.e2e, pytest.mark.torch, pytest.mark.timeout(1200)]


def _small_corpus(folder: Path) -> Path:
    """Four intents of the corpus, as JSON lines with other column names."""
    for stem, rows_per_label in (("train", 60), ("test", 15)):
        counts = dict.fromkeys(LABELS, 0)
        with (
            (CORPUS / f"{stem}.csv").open(newline="") as source,
            (folder / f"{stem}.jsonl").open("w") as target,
        ):
            for row in csv.DictReader(source):
                if counts.get(row["label"], rows_per_label) < rows_per_label:
                    counts[row["label"]] += 1
                    line = {"utterance": row["text"], "intent": row["label"]}
                    target.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs that the first demo traces and the second one finds."""
    return tmp_path_factory.mktemp("cache")


def _demo(data: Path, out: Path, cache: Path) -> list[str]:
    command = [sys.executable, "-m", "examples.demo", "--data", str(data), "--out", str(out)]
    columns = ["--text", "utterance", "--label", "intent"]
    return [*command, *columns, "--rounds", "4", "--cache", str(cache)]


def test_the_demo_trains_encrypted_and_answers_on_the_device(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    command = _demo(_small_corpus(tmp_path), out, cache)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    rows = re.findall(r"(\d)/4 │ +([\d.]+)% │.*│ +([\d.]+) MB │.*│ (\w+) +│", result.stdout)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1][1]) > 60.0  # chance is 25
    assert {row[3] for row in rows} == {"nothing"}

    assert len(re.findall(r"^\w+ +[\d.]+%  \S", result.stdout, re.MULTILINE)) == 5
    models = [_active_model(out / f"agent-{n}") for n in (1, 2, 3)]
    assert len({(model / ADAPTER_FILE).read_bytes() for model in models}) == 1  # bit-equal
    _answers_stand_alone(models[0])
    assert not _processes_of(out)


def _active_model(home: Path) -> Path:
    [pointer] = (home / "models").glob("*/active")
    return pointer.parent / str(json.loads(pointer.read_text())["version"])


def _answers_stand_alone(model: Path) -> None:
    """The folder answers through our command and loads in a bare ONNX Runtime."""
    adapter = load_exported(model)
    [prediction] = adapter.model.answer(adapter.theta, ["set a timer for ten minutes"])
    assert prediction.label == "set_timer"
    session = ort.InferenceSession(str(model / "infer.onnx"), providers=["CPUExecutionProvider"])
    assert {node.name for node in session.get_inputs()} == {"input_ids", "attention_mask"}
    assert (model / PLAN_FILE).exists()


def test_control_c_ends_every_process(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    demo = subprocess.Popen(
        _demo(_small_corpus(tmp_path), out, cache), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        log = out / "agent-3.log"
        while demo.poll() is None and not (log.exists() and "training" in log.read_text()):
            time.sleep(0.2)
        assert _processes_of(out)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 130
    assert "every process has been ended" in output
    assert not _processes_of(out)


def _processes_of(out: Path) -> list[int]:
    """Processes that were started on this folder, but for ourselves and the demo."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["pid"] != os.getpid() and any(
            str(out) in word and "examples.demo" not in words for word in words
        ):
            found.append(process.info["pid"])
    return found
