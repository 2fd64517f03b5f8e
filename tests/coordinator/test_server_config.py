"""`coordinator.toml`: what is written is read, and nothing else is accepted."""

from pathlib import Path

import pytest

from coordinator.premises import CONFIG_FILE, ServerConfig, load_server_config, write_server_config
from fedloom.errors import ConfigError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    config = ServerConfig("::1", "::", 1, 2, 0)
    write_server_config(tmp_path, config)
    assert load_server_config(tmp_path) == config


@pytest.mark.parametrize("line", ["crypto_processes = -1", "crypto_processes = 257"])
def test_a_number_of_processes_that_cannot_be_is_refused_by_name(tmp_path: Path, line: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(line + "\n")
    with pytest.raises(ConfigError, match="crypto_processes"):
        load_server_config(tmp_path)


@pytest.mark.parametrize("line", ["crypto_threads = 1", 'crypto_processes = "2"', "address = 1"])
def test_unknown_keys_and_wrong_types_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(line + "\n")
    with pytest.raises(ConfigError):
        load_server_config(tmp_path)
