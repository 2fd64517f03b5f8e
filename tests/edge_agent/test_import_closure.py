"""What the agent's process loads: never torch and its family, nor the coordinator."""

import subprocess
import sys
from pathlib import Path

from edge_agent.data import DataSource

FORBIDDEN = ("torch", "transformers", "onnx", "peft", "safetensors", "coordinator", "tenseal")
HEAVY = ("onnxruntime", "tokenizers", "pyarrow")

TRAIN = """
import sys
from pathlib import Path
import edge_agent.checkpoints, edge_agent.onnx_engine, edge_agent.inference
from edge_agent.data import DataSource
from fedloom.exports import export_model
from fedloom.plans import load_plan
from fedloom.terms import LocalTraining
from fedloom.adapters import read_adapter
folder, data = Path(sys.argv[1]), DataSource(Path(sys.argv[2]))
plan = load_plan(folder)
theta = read_adapter(folder / "adapter_model.safetensors", plan.layout)
engine = edge_agent.onnx_engine.OnnxEngine(folder, plan, data, data, threads=1)
checkpoint = edge_agent.checkpoints.Checkpoint(folder.parent, bytes(16), 1)
theta = theta + engine.train(theta, LocalTraining(), 0, lambda share: None, checkpoint).delta
engine.evaluate(theta)
export_model(folder, plan, theta, folder.parent / "out")
adapter = edge_agent.inference.load_exported(folder.parent / "out")
adapter.model.answer(adapter.theta, ["lamp"])
print(*sys.modules)
"""
LIGHT = """
import sys
import edge_agent.batches, edge_agent.checkpoints, edge_agent.data, edge_agent.engine
import edge_agent.optimisers, edge_agent.engines, edge_agent.app
print(*sys.modules)
"""


def _loaded(program: str, *arguments: str) -> set[str]:
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_training_and_inference_load_nothing_of_torch(toy, train_data: DataSource) -> None:
    folder: Path = toy.folder
    loaded = _loaded(TRAIN, str(folder), str(train_data.path))
    assert not loaded.intersection(FORBIDDEN)
    assert "onnxruntime" in loaded


def test_reading_data_and_stepping_load_nothing_heavy() -> None:
    assert not _loaded(LIGHT).intersection((*FORBIDDEN, *HEAVY))
