"""Where a model comes from."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import ConfigError


@dataclass(frozen=True)
class ModelSource:
    """`location` is what transformers loads; `name` stands in files and tells no machine's path."""

    location: str
    name: str


def find_model(model: str) -> ModelSource:
    """Return where a model is: a folder, an installed package's folder `model`, or the hub."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return ModelSource(str(folder), folder.resolve().name)
    if folder.exists():
        raise ConfigError("model", f"expected config.json in {model}, found none")
    module = model.replace("-", "_")
    package = importlib.util.find_spec(module) if module.isidentifier() else None
    for place in (package.submodule_search_locations or []) if package else []:
        if (Path(place) / "model" / "config.json").is_file():
            return ModelSource(str(Path(place) / "model"), model)
    return ModelSource(model, model)
