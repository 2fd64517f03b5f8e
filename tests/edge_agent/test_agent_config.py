"""`agent.toml`: what its numbers may be."""

from pathlib import Path

import pytest

from edge_agent.config import CONFIG_FILE, load_agent_config
from fedloom.errors import ConfigError


def write(home: Path, engine: str) -> Path:
    (home / CONFIG_FILE).write_text(f'[data]\npath = "train.csv"\n[engine]\n{engine}\n')
    return home


def test_the_numbers_of_the_engine_have_defaults_and_are_read(tmp_path: Path) -> None:
    config = load_agent_config(write(tmp_path, ""))
    assert (config.threads, config.crypto_processes) == (0, 1)
    config = load_agent_config(write(tmp_path, "threads = 1024\ncrypto_processes = 0"))
    assert (config.threads, config.crypto_processes) == (1024, 0)


@pytest.mark.parametrize("key", ["threads", "crypto_processes"])
@pytest.mark.parametrize("value", ["-1", "1025", "2.0", '"2"', "true"])
def test_a_number_that_cannot_be_is_refused_by_name(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}"):
        load_agent_config(write(tmp_path, f"{key} = {value}"))
