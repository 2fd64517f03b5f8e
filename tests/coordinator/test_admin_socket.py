"""The operator's socket: found while somebody serves, in one hand only, at paths of any length."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.admin_socket import (
    ELSEWHERE_FILE,
    MAX_PATH_BYTES,
    SOCKET_FILE,
    claimed_socket,
    find_socket,
    private_umask,
)
from fedloom.errors import ConfigError


@contextmanager
def listener(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        yield


@pytest.fixture(params=["short", "long"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name = "home" if request.param == "short" else "deep" * 40
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_it_is_found_while_somebody_listens(home: Path) -> None:
    assert find_socket(home) is None
    with claimed_socket(home) as path:
        assert len(os.fsencode(path)) <= MAX_PATH_BYTES
        with listener(path):
            assert find_socket(home) == path
        assert find_socket(home) is None
    assert find_socket(home) is None
    assert not (home / ELSEWHERE_FILE).exists()


def test_a_long_path_has_its_socket_in_a_private_folder(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 40)
    home.mkdir()
    with claimed_socket(home) as path:
        assert path.parent != home
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert (home / ELSEWHERE_FILE).read_text().strip() == str(path)
    assert not path.parent.exists()


def test_one_coordinator_serves_a_folder(home: Path) -> None:
    with (
        claimed_socket(home) as path,
        listener(path),
        pytest.raises(ConfigError, match="is serving this folder already"),
        claimed_socket(home),
    ):
        pass


def test_what_a_killed_process_left_is_taken_over(home: Path) -> None:
    with claimed_socket(home) as path, listener(path):
        recorded = home / ELSEWHERE_FILE
        left = recorded.read_text() if recorded.exists() else None
    if left is None:
        (home / SOCKET_FILE).touch()
    else:
        recorded.write_text(left)
    assert find_socket(home) is None
    with claimed_socket(home) as path:
        path.unlink(missing_ok=True)  # as gRPC does before it binds
        with listener(path):
            assert find_socket(home) == path


def test_a_socket_of_another_user_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ConfigError, match="run this as the user that the coordinator runs as"):
        find_socket(tmp_path)


def test_files_of_the_block_are_the_owners_alone(tmp_path: Path) -> None:
    with private_umask():
        (tmp_path / "inside").touch(0o666)
    (tmp_path / "outside").touch(0o666)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("inside", "outside")]
    assert modes[0] == 0o600
    assert modes[1] != 0o600
