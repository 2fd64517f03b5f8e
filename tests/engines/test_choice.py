"""Which engine `agent.toml` gets: named things that are not there are errors that list what is."""

import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from edge_agent.config import AgentConfig, OnnxSettings, TorchSettings
from edge_agent.data import DataSource
from edge_agent.engines import engine_maker
from fedloom.errors import ConfigError
from fedloom.terms import LocalTraining
from tests.edge_agent.toy import Toy, Unkept, save_toy

CPU = "CPUExecutionProvider"


def config(data: DataSource, engine: OnnxSettings | TorchSettings) -> AgentConfig:
    return AgentConfig(data, threads=1, engine=engine)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return save_toy(tmp_path / "plan")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (OnnxSettings(), "OnnxEngine"),
        (OnnxSettings((CPU, CPU)), "OnnxEngine"),
        (TorchSettings("cpu"), "TorchEngine"),
        (TorchSettings("cpu", bfloat16=True), "TorchEngine"),
    ],
    ids=str,
)
def test_the_settings_choose_the_engine_and_it_trains(
    toy: Toy,
    train_data: DataSource,
    tmp_path: Path,
    settings: OnnxSettings | TorchSettings,
    name: str,
) -> None:
    engine = engine_maker(tmp_path, config(train_data, settings))(toy.folder, toy.plan)
    assert type(engine).__name__ == name
    update = engine.train(toy.theta, LocalTraining(), 1, lambda share: None, Unkept())
    assert update.samples == 200


@pytest.mark.parametrize(
    ("settings", "key", "listed"),
    [
        (OnnxSettings(("AbacusExecutionProvider",)), "engine.provider", CPU),
        (OnnxSettings((CPU, "cuda")), "engine.provider", CPU),
        (TorchSettings("abacus"), "engine.device", "cpu"),
        (TorchSettings("cpu:1"), "engine.device", "cpu"),
    ],
    ids=str,
)
def test_what_this_machine_lacks_is_an_error_that_lists_what_it_has(
    train_data: DataSource,
    tmp_path: Path,
    settings: OnnxSettings | TorchSettings,
    key: str,
    listed: str,
) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected .*{listed}"):
        engine_maker(tmp_path, config(train_data, settings))


def test_without_torch_the_extra_is_named(
    train_data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.engines.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fedloom\[torch\]"):
        engine_maker(tmp_path, config(train_data, TorchSettings()))


def test_a_device_without_bfloat16_is_refused(
    train_data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.torch_engine.has_bfloat16", lambda device: False)
    with pytest.raises(ConfigError, match=r"engine\.precision: .*float32"):
        engine_maker(tmp_path, config(train_data, TorchSettings("cpu", bfloat16=True)))


def test_a_provider_that_falls_back_to_the_cpu_is_said_aloud(
    toy: Toy, train_data: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists providers whose libraries are missing, and goes on without them."""
    import onnxruntime

    from edge_agent.onnx_engine import OnnxEngine

    def session(path: str, options: object, providers: list[tuple[str, object]]) -> object:
        asked.append(providers)
        return real(path, options, providers=[CPU])

    asked: list[list[tuple[str, object]]] = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine = OnnxEngine(
        toy.folder, toy.plan, train_data, None, 1, providers=("CUDAExecutionProvider",)
    )
    with structlog.testing.capture_logs() as lines:
        engine.train(toy.theta, LocalTraining(), 1, lambda share: None, Unkept())
    assert [[name for name, _ in providers] for providers in asked] == [
        ["CUDAExecutionProvider", CPU]
    ]
    assert [line for line in lines if line["log_level"] == "warning"] == [
        {
            "event": "execution provider not used",
            "log_level": "warning",
            "provider": "CUDAExecutionProvider",
            "used": [CPU],
        }
    ]


PROGRAM = """
import sys
from pathlib import Path
import edge_agent.app
from edge_agent.config import load_agent_config
from edge_agent.engines import engine_maker
home = Path(sys.argv[1])
engine_maker(home, load_agent_config(home))
print(*sys.modules)
"""


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_torch_is_loaded_when_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    (tmp_path / "agent.toml").write_text(f'[data]\npath = "a.csv"\n[engine]\nkind = "{kind}"\n')
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "onnx", "onnxruntime", "tokenizers"}.intersection(process.stdout.split())
    assert {"torch", "onnx"} <= heavy if kind == "torch" else not heavy


def test_threads_that_wait_leave_the_cores_to_others(tmp_path: Path) -> None:
    """What torch's OpenMP reads when it is loaded says so."""
    (tmp_path / "agent.toml").write_text('[data]\npath = "a.csv"\n[engine]\nkind = "torch"\n')
    program = PROGRAM + "import os; print(os.environ['OMP_WAIT_POLICY'])"
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[-1] == "PASSIVE"
