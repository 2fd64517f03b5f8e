"""`agent.toml`: the device's data and policy, as frozen values. Unknown keys are errors.

[data]
path = "train.csv"           # CSV, JSONL, Parquet, CoNLL text or .npz, or a folder; from this file
text = "text"                # names of columns, each for the tasks that need it
label = "label"
words = "words"              # lists, or texts with blanks between words
tags = "tags"
prompt = "Q: {question}"     # in place of the plan's template; {COLUMN} stands for a row's value
answer = "{reply}"
arrays = { window = ["x0..x99"], age = ["age"] }   # columns, by the names of the plan's inputs
unknown_labels = "refuse"    # or "skip": rows whose label the plan does not know

[held_out]                   # optional: quality is measured on it after every round
path = "test.csv"            # and columns as above

[split]                      # optional, in place of [held_out]
held_out = 0.1               # share of the rows of [data], chosen by their content

[privacy]
scrub = ["email", "phone", "card", "iban", "names"]   # replaced before texts are tokenised
phone_region = "DE"          # where numbers without +49 or the like belong; else they stay
names_model = "ner"          # folder of an exported model that tags names of persons

[policy]
minimum_protection = "sealed"      # runs with less are declined
release = "agents"                 # or "coordinator": who may get the opened sums
evaluation = "mean"                # or "each": whether a run may ask for this device's own quality
capability = "told"                # or "withheld": memory, speed, processors, engine, rounded

[availability]               # optional: when this device takes part; else it is there at any time
windows = ["22:00-06:00", "sat,sun 00:00-24:00", "mon-fri 12:00-13:30"]   # local times
power = "any"                # or "mains": never on battery, where the system tells (Linux)

[engine]
kind = "onnx"                # or "torch", of fedloom[torch]
provider = "CPUExecutionProvider"  # with "onnx": of ONNX Runtime, or a list of them, the best first
device = "auto"              # with "torch": its name, such as "cpu", "cuda", "cuda:1", "mps"
precision = "float32"        # with "torch": or "bfloat16", faster where the device has it
threads = 0                  # to train with; 0: as many as the device has cores
crypto_processes = 1         # to encrypt in; 1: the agent's own, 0: one for each core
memory_mb = 0                # to train in, the whole agent; 0: what the system has

[models]
keep = 5                     # newest versions of each adapter, and last ones of as many runs
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from crypto import MAX_PROCESSES
from edge_agent.availability import ALWAYS, Availability, parse_window
from edge_agent.data import DataSource
from edge_agent.data_config import (
    DATA_KEYS,
    policy_lines,
    quoted,
    read_held_out_share,
    read_sources,
    source_lines,
    treatment_lines,
)
from edge_agent.model_versions import DEFAULT_KEPT, MAX_KEPT
from fedloom.errors import ConfigError
from fedloom.quality import Report
from fedloom.terms import Protection, Release

CONFIG_FILE = "agent.toml"
_MAX_MEMORY_MB = 2**24
_E = TypeVar("_E", bound=Enum)
_KEYS = {
    **DATA_KEYS,
    "policy": {"minimum_protection", "release", "evaluation", "capability"},
    "availability": {"windows", "power"},
    "engine": {
        *("kind", "provider", "device", "precision"),
        *("threads", "crypto_processes", "memory_mb"),
    },
    "models": {"keep"},
}
_KEYS_OF_KIND = {"onnx": {"provider"}, "torch": {"device", "precision"}}
_PRECISIONS = ("float32", "bfloat16")


class _Capability(Enum):
    """Whether the coordinator is told what the device can do."""

    TOLD = "told"
    WITHHELD = "withheld"


@dataclass(frozen=True)
class OnnxSettings:
    """Train with ONNX Runtime; `providers` are tried in order, the CPU is always the last."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class TorchSettings:
    """Train with torch on a device of that name; products are in bfloat16 or in float32."""

    device: str = "auto"
    bfloat16: bool = False


@dataclass(frozen=True)
class AgentConfig:
    """What this device trains on, and what it agrees to."""

    data: DataSource
    held_out: DataSource | None = None
    minimum_protection: Protection = Protection.SEALED
    permitted_release: Release = Release.AGENTS
    threads: int = 0
    crypto_processes: int = 1
    held_out_share: float = 0.0  # of `data`, where `held_out` is None
    memory_mb: int = 0  # 10^6 bytes
    engine: OnnxSettings | TorchSettings = OnnxSettings()
    kept_models: int = DEFAULT_KEPT
    permitted_report: Report = Report.MEAN
    availability: Availability = ALWAYS
    tells_capability: bool = True

    @property
    def engine_name(self) -> str:
        """The engine's name as the coordinator is told."""
        return "torch" if isinstance(self.engine, TorchSettings) else "onnx"


def load_agent_config(home: Path) -> AgentConfig:
    """Read `agent.toml`; raises ConfigError that names the wrong key."""
    path = home / CONFIG_FILE
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read: join first, with --data ({error.strerror})"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML: {error}") from error
    for section, values in table.items():
        if section not in _KEYS or not isinstance(values, dict):
            raise ConfigError(str(path), f"[{section}]: expected one of {sorted(_KEYS)}")
        for key in values:
            if key not in _KEYS[section]:
                expected = sorted(_KEYS[section])
                raise ConfigError(str(path), f"{section}.{key}: expected one of {expected}")
    data, held_out = read_sources(path, table)
    policy = table.get("policy", {})
    return AgentConfig(
        data,
        held_out,
        _named(path, policy, "minimum_protection", Protection.SEALED),
        _named(path, policy, "release", Release.AGENTS),
        _count(path, table, "threads", 0, 1024),
        _count(path, table, "crypto_processes", 1, MAX_PROCESSES),
        memory_mb=_count(path, table, "memory_mb", 0, _MAX_MEMORY_MB),
        held_out_share=read_held_out_share(path, table),
        engine=_engine(path, table.get("engine", {})),
        kept_models=_kept_models(path, table),
        permitted_report=_report(path, policy),
        availability=_availability(path, table.get("availability", {})),
        tells_capability=_named(path, policy, "capability", _Capability.TOLD) is _Capability.TOLD,
    )


def write_agent_config(home: Path, config: AgentConfig) -> None:
    """Write a first `agent.toml`."""
    treatment = config.data.treatment
    lines = ["[data]", *source_lines(config.data), *policy_lines(treatment), ""]
    if config.held_out is not None:
        lines += ["[held_out]", *source_lines(config.held_out), ""]
    lines += treatment_lines(treatment, config.held_out_share)
    lines += [
        "[policy]",
        f'minimum_protection = "{config.minimum_protection.name.lower()}"',
        f'release = "{config.permitted_release.name.lower()}"',
        f'evaluation = "{config.permitted_report.name.lower()}"',
        "",
        "[engine]",
        *_engine_lines(config.engine),
        f"threads = {config.threads}",
        f"crypto_processes = {config.crypto_processes}",
        f"memory_mb = {config.memory_mb}",
        "",
        "[models]",
        f"keep = {config.kept_models}",
        "",
    ]
    (home / CONFIG_FILE).write_text("\n".join(lines))


def _engine_lines(settings: OnnxSettings | TorchSettings) -> list[str]:
    match settings:
        case OnnxSettings(providers):
            return ['kind = "onnx"', f"provider = [{', '.join(map(quoted, providers))}]"]
        case TorchSettings(device, bfloat16):
            precision = _PRECISIONS[bfloat16]
            return [
                'kind = "torch"',
                f"device = {quoted(device)}",
                f"precision = {quoted(precision)}",
            ]


def _named(path: Path, policy: Mapping[str, Any], key: str, default: _E) -> _E:
    """Return the member of the default's enum that the policy names."""
    names = {member.name.lower(): member for member in type(default)}
    name = policy.get(key, default.name.lower())
    if not isinstance(name, str) or name not in names:
        raise ConfigError(
            str(path), f"policy.{key}: expected one of {sorted(names)}, found {name!r}"
        )
    return names[name]


def _engine(path: Path, engine: Mapping[str, Any]) -> OnnxSettings | TorchSettings:
    kind = engine.get("kind", "onnx")
    if kind not in ("onnx", "torch"):
        raise ConfigError(str(path), f"engine.kind: expected onnx or torch, found {kind!r}")
    for other, keys in _KEYS_OF_KIND.items():
        for key in sorted(keys & set(engine)):
            if other != kind:
                problem = f'engine.{key}: expected with kind = "{other}" alone'
                raise ConfigError(str(path), problem)
    if kind == "onnx":
        return OnnxSettings(_providers(path, engine))
    device, precision = engine.get("device", "auto"), engine.get("precision", "float32")
    if not isinstance(device, str):
        raise ConfigError(str(path), f"engine.device: expected a name, found {device!r}")
    if precision not in _PRECISIONS:
        problem = f"engine.precision: expected one of {list(_PRECISIONS)}, found {precision!r}"
        raise ConfigError(str(path), problem)
    return TorchSettings(device, precision == "bfloat16")


def _providers(path: Path, engine: Mapping[str, Any]) -> tuple[str, ...]:
    found = engine.get("provider", OnnxSettings().providers[0])
    names = found if isinstance(found, list) else [found]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(str(path), f"engine.provider: expected names, found {found!r}")
    return tuple(names)


def _report(path: Path, policy: Mapping[str, Any]) -> Report:
    found = _named(path, policy, "evaluation", Report.MEAN)
    if found is Report.NONE:  # no run learns more of a device than its part in a mean anyway
        raise ConfigError(str(path), "policy.evaluation: expected each or mean, found 'none'")
    return found


def _availability(path: Path, said: Mapping[str, Any]) -> Availability:
    texts, power = said.get("windows", []), said.get("power", "any")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(str(path), f"availability.windows: expected texts, found {texts!r}")
    if power not in ("any", "mains"):
        raise ConfigError(str(path), f"availability.power: expected any or mains, found {power!r}")
    try:
        windows = tuple(parse_window(text) for text in texts)
    except ValueError as error:
        raise ConfigError(str(path), f"availability.windows: {error}") from error
    return Availability(windows, power == "mains")


def _count(path: Path, table: Mapping[str, Any], key: str, default: int, most: int) -> int:
    found = table.get("engine", {}).get(key, default)
    if type(found) is not int or not 0 <= found <= most:
        raise ConfigError(str(path), f"engine.{key}: expected 0..{most}, found {found!r}")
    return found


def _kept_models(path: Path, table: Mapping[str, Any]) -> int:
    found = table.get("models", {}).get("keep", DEFAULT_KEPT)
    if type(found) is not int or not 1 <= found <= MAX_KEPT:
        raise ConfigError(str(path), f"models.keep: expected 1..{MAX_KEPT}, found {found!r}")
    return found
