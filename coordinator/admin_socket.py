"""Where the local operator finds a coordinator: a unix socket in its folder.

Whoever may open it is an operator, so the folder has mode 0700 and the socket 0600. The kernel
takes paths of about 100 bytes for sockets; a folder that lies deeper has its socket in a private
folder of the runtime or temporary directory, and the file `admin.path` says where.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedloom.errors import ConfigError

SOCKET_FILE = "admin.sock"
ELSEWHERE_FILE = "admin.path"
MAX_PATH_BYTES = 100  # sun_path: 104 on macOS, 108 on Linux, with a zero at the end


def find_socket(home: Path) -> Path | None:
    """Return the socket on which a coordinator answers now; None when nobody serves the folder."""
    path = home.absolute() / SOCKET_FILE
    try:
        if _is_too_long(path):
            path = Path((home / ELSEWHERE_FILE).read_text().strip())
        return path if _answers(path) else None
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ConfigError(
            str(home), "permission denied: run this as the user that the coordinator runs as"
        ) from error


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):  # left by a process that was killed
            return False
        return True


@contextmanager
def claimed_socket(home: Path) -> Iterator[Path]:
    """Yield the path to listen on, short enough; raises ConfigError when somebody listens there.

    gRPC would take the path away from a coordinator that serves already, and neither would notice.
    """
    if find_socket(home) is not None:
        raise ConfigError(str(home), "a coordinator is serving this folder already")
    path = home.absolute() / SOCKET_FILE
    if not _is_too_long(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fedloom-", dir=_runtime_folder()) as folder:
        path = Path(folder) / SOCKET_FILE
        if _is_too_long(path):
            raise ConfigError(folder, f"expected a temporary path below {MAX_PATH_BYTES} bytes")
        (home / ELSEWHERE_FILE).write_text(f"{path}\n")
        try:
            yield path
        finally:
            with suppress(OSError):
                (home / ELSEWHERE_FILE).unlink()


@contextmanager
def private_umask() -> Iterator[None]:
    """Have files made in the block be the owner's alone, from their first moment."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _is_too_long(path: Path) -> bool:
    return len(os.fsencode(path)) > MAX_PATH_BYTES


def _runtime_folder() -> Path | None:
    folder = Path("/run/user") / str(os.getuid())
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
