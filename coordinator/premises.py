"""What lies in a coordinator's folder: its configuration, its store, its artifacts, and who it is.

Apart from `server`, so that a command that only looks into the folder imports none of what serves.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from coordinator.authority import Authority, authority_is_offline
from coordinator.membership import Membership
from coordinator.operations import Operations, Serving
from coordinator.published import Published, PublishedFolder
from coordinator.store import Store
from fedloom.errors import ConfigError

CONFIG_FILE = "coordinator.toml"


@dataclass(frozen=True)
class ServerConfig:
    """`coordinator.toml`: where agents find this coordinator, and what it listens on."""

    address: str = "localhost"  # host name or IP address that agents connect to
    listen: str = "[::]"  # interface
    control_port: int = 7070  # mutual TLS: agents
    enrolment_port: int = 7072  # TLS: devices that have a token and no certificate yet
    crypto_processes: int = 1  # to add updates in; 1: this one, 0: one for each core
    metrics_listen: str = "127.0.0.1:7071"  # HTTP without login: a page, /metrics; empty: off
    store: str = "sqlite"  # store.sqlite in the folder, or postgresql+psycopg://USER@HOST/DATABASE
    artifacts: str = "folder"  # artifacts/ in the folder, or s3://BUCKET/PREFIX
    artifacts_endpoint: str = ""  # URL of a server that speaks S3; empty for Amazon's
    admin_listen: str = ""  # host:port, mutual TLS: operators elsewhere; empty: local ones only

    @property
    def control_address(self) -> str:
        """`host:port` of the control and artifact services."""
        return f"{_bracketed(self.address)}:{self.control_port}"

    @property
    def enrolment_address(self) -> str:
        """`host:port` of the enrolment service."""
        return f"{_bracketed(self.address)}:{self.enrolment_port}"


def load_server_config(home: Path) -> ServerConfig:
    """Read `coordinator.toml`; raises ConfigError on unknown keys and wrong types."""
    path = home / CONFIG_FILE
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            str(path), f"expected a coordinator's folder: run `init` ({error})"
        ) from error
    table.pop("limits", None)  # read by coordinator/services/limits.py
    known = {field.name: type(field.default) for field in fields(ServerConfig)}
    for key, value in table.items():
        if key not in known or type(value) is not known[key]:
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            # Without the value: whoever misspells `store` may have written a password there.
            found = f"{key} ({type(value).__name__})"
            raise ConfigError(str(path), f"expected {expected}; found {found}")
    config = ServerConfig(**table)
    if config.crypto_processes != ServerConfig.crypto_processes:
        _check_processes(config.crypto_processes, path)
    return config


def _check_processes(found: int, path: Path) -> None:
    from crypto import MAX_PROCESSES  # and numpy with it, which most commands do without

    if not 0 <= found <= MAX_PROCESSES:
        expected = f"expected 0..{MAX_PROCESSES}, found {found}"
        raise ConfigError(str(path), f"crypto_processes: {expected}")


def write_server_config(home: Path, config: ServerConfig) -> None:
    """Write `coordinator.toml`."""
    lines = [
        f"{field.name} = {_toml(getattr(config, field.name))}\n" for field in fields(ServerConfig)
    ]
    (home / CONFIG_FILE).write_text("".join(lines))


def open_store(home: Path) -> Store:
    """Open the coordinator's memory."""
    place = load_server_config(home).store
    return Store(home / "store.sqlite" if place == "sqlite" else place)


def open_published(home: Path) -> Published:
    """Open the place of published artifacts."""
    config = load_server_config(home)
    if config.artifacts == "folder":
        return PublishedFolder(home / "artifacts")
    try:
        from coordinator.bucket import open_bucket
    except ImportError as error:
        raise ConfigError(
            "artifacts", 'S3 needs more packages: pip install "fedloom[s3]"'
        ) from error
    return open_bucket(config.artifacts, config.artifacts_endpoint, home / "spool")


def open_operations(
    home: Path,
    config: ServerConfig,
    store: Store,
    published: Published,
    serving: Serving | None = None,
) -> Operations:
    """Put together what operators can do in this folder; `serving` is there while it is served."""
    members = Membership(
        store.roster,
        config.enrolment_address,
        Authority.load(home).certificate_der,
        serving,
    )
    return Operations(
        store, published, members, home / "spool", authority_is_offline(home), serving
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
