"""The engine that `agent.toml` asks for, checked against what this machine has."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from edge_agent.config import CONFIG_FILE, AgentConfig, OnnxSettings, TorchSettings
from edge_agent.engine import Engine
from edge_agent.resources import MEGABYTE, training_tokens
from fedloom.errors import ConfigError
from fedloom.plans import Plan

EngineMaker = Callable[[Path, Plan], Engine]


def engine_maker(home: Path, config: AgentConfig) -> EngineMaker:
    """Return what makes the engine of a plan in its folder.

    Raises ConfigError that lists what there is when the settings name something else. The engine's
    library is loaded when it is needed: the usual settings need no check, and so no library.
    """
    match config.engine:
        case OnnxSettings() as settings:
            return _onnx_maker(home, config, settings)
        case TorchSettings() as settings:
            return _torch_maker(home, config, settings)


def _onnx_maker(home: Path, config: AgentConfig, settings: OnnxSettings) -> EngineMaker:
    if settings != OnnxSettings():
        import onnxruntime

        available = onnxruntime.get_available_providers()
        for name in settings.providers:
            if name not in available:
                problem = f"engine.provider: expected some of {available}, found {name!r}"
                raise ConfigError(str(home / CONFIG_FILE), problem)

    def make(folder: Path, plan: Plan) -> Engine:
        from edge_agent.onnx_engine import OnnxEngine

        return OnnxEngine(
            folder,
            plan,
            config.data,
            config.held_out,
            threads=config.threads,
            micro_batch_tokens=training_tokens(plan, config.memory_mb * MEGABYTE),
            providers=settings.providers,
        )

    return make


def _torch_maker(home: Path, config: AgentConfig, settings: TorchSettings) -> EngineMaker:
    file = str(home / CONFIG_FILE)
    if not (find_spec("torch") and find_spec("onnx")):
        missing = 'torch needs torch and onnx, which are missing: pip install "fedloom[torch]"'
        raise ConfigError(file, f"engine.kind: {missing}")
    # Threads that wait must not keep a core busy: the device has other work. On two cores that
    # others use too, a step with MiniLM took 115 ms instead of 2,900. Read once, by torch's OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edge_agent.torch_engine import TorchEngine, find_device, has_bfloat16

    try:
        device = find_device(settings.device)
    except LookupError as error:
        raise ConfigError(file, f"engine.device: {error}") from error
    if settings.bfloat16 and not has_bfloat16(device):
        problem = f'engine.precision: expected "float32", which is what {device} computes in'
        raise ConfigError(file, problem)

    def tokens(plan: Plan) -> int:
        budget = config.memory_mb * MEGABYTE
        limited = budget and device.type == "cpu"  # an accelerator has memory of its own
        return training_tokens(plan, budget) if limited else 0  # 0: what suits the device

    def make(folder: Path, plan: Plan) -> Engine:
        return TorchEngine(
            folder,
            plan,
            config.data,
            config.held_out,
            threads=config.threads,
            micro_batch_tokens=tokens(plan),
            device=settings.device,
            bfloat16=settings.bfloat16,
        )

    return make
