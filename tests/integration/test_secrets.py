"""After a protected run, neither the coordinator's disk nor anybody's log holds a secret."""

import asyncio
import base64
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from coordinator.run_state import Phase
from crypto import cohort
from crypto.errors import MalformedMessage
from edge_agent.run_keys import open_envelope
from fedloom.tokens import parse_token
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation
from tests.integration.processes import agent_processes, coordinator


def forms_of(secret: bytes) -> list[bytes]:
    """Return what a secret may look like: raw, hex, and base64 at any of its three alignments."""
    forms = [secret, secret.hex().encode(), secret.hex().upper().encode()]
    for skipped in range(3):
        whole = secret[skipped : skipped + (len(secret) - skipped) // 3 * 3]
        forms += [base64.b64encode(whole), base64.urlsafe_b64encode(whole)]
    return forms


def places(secret: bytes, files: Iterable[Path]) -> list[str]:
    """Return the files in which the secret shows in any form."""
    forms = forms_of(secret)
    found = []
    for path in files:
        content = path.read_bytes()
        without_newlines = content.replace(b"\n", b"")  # PEM breaks lines
        if any(form in content or form in without_newlines for form in forms):
            found.append(path.name)
    return found


def files_below(*folders: Path) -> list[Path]:
    """Return every file, hidden ones and SQLite's log included."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def private_values(agent: Agent) -> list[bytes]:
    """Return the numbers that nobody but this agent may know."""
    identity = agent.identity
    tls = identity.key.private_numbers().private_value.to_bytes(32, "big")
    der = identity.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    signing = identity.identity_key.private_bytes_raw()
    return [tls, der, identity.exchange_key.private_bytes_raw(), signing]


@pytest.mark.parametrize("kind", ["encrypted", "sealed"])
async def test_a_protected_run_of_processes_leaves_no_secret_behind(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    agents = await federation.enrol_all()
    token = parse_token(federation.invite("somebody"))
    await federation.stop()
    run_id = federation.start_run(kind, rounds=3)
    logs = tmp_path / "logs"
    logs.mkdir()
    async with (
        coordinator(federation, logs / "coordinator.log") as server,
        agent_processes(agents, logs) as devices,
    ):
        seeds = await mask_secrets(agents, run_id, devices)
        assert [await device.wait() for device in devices] == [0, 0, 0], logs_of(logs)
        assert await server.wait() == 0, logs_of(logs)
    assert federation.run(run_id).phase is Phase.COMPLETED
    assert bool(seeds) == (kind == "sealed")

    envelope = control_pb2.KeyEnvelope.FromString(federation.store.envelopes(run_id)[1]["agent-0"])
    run_key = open_envelope(agents[0].identity, run_id, envelope)
    secrets = [run_key.secret, *(run_key.derive(use, run_id) for use in ("bfv secret", "tag key"))]
    secrets += [token.secret, agents[0].theta(run_id)[100:116].tobytes(), *seeds]
    for agent in agents:
        secrets += private_values(agent)
    searched = files_below(federation.home, logs)
    assert {"store.sqlite", "coordinator.log", "agent-0.log"} <= {path.name for path in searched}
    assert [place for secret in secrets for place in places(secret, searched)] == []
    # What must be found is found: the wrapped key in the database, the key itself on no device.
    assert places(envelope.wrapped, searched) != []
    assert places(run_key.secret, files_below(*(agent.home for agent in agents))) == []


async def mask_secrets(
    agents: list[Agent], run_id: bytes, devices: list[asyncio.subprocess.Process]
) -> set[bytes]:
    """Return the secrets that masks were made from, as they came by on the devices' disks."""
    found = set()
    while any(device.returncode is None for device in devices):
        for agent in agents:
            state = agent.home / "runs" / run_id.hex() / "masks.state"
            with contextlib.suppress(OSError, MalformedMessage):
                found.add(cohort.MemberState.decode(state.read_bytes()).secret)
        await asyncio.sleep(0.005)
    return found - {b""}


def logs_of(folder: Path) -> str:
    """Return all logs, for the report of a failure."""
    return "\n".join(path.read_text() for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("form", range(9))
async def test_the_search_finds_a_planted_key(federation: Federation, form: int) -> None:
    secret = os.urandom(32)
    planted = federation.home / "spool" / "planted"
    planted.parent.mkdir(exist_ok=True)
    planted.write_bytes(b"prefix" + forms_of(secret)[form] + b"suffix")
    assert places(secret, files_below(federation.home)) == ["planted"]


async def test_the_search_finds_a_key_in_the_database(federation: Federation) -> None:
    secret = os.urandom(32)
    federation.store.put_envelopes(bytes(16), 1, {"agent-0": b"around" + secret})
    found = places(secret, files_below(federation.home))
    assert found
    assert all(name.startswith("store.sqlite") for name in found)


async def test_private_files_are_for_their_owner_alone(federation: Federation) -> None:
    [agent] = await federation.enrol_all((32,))
    for path in (agent.home / name for name in ("agent.pem", "exchange.key", "identity.key")):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for path in (federation.home / "authority.key", federation.home / "server.key"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for home in (agent.home, federation.home):
        assert home.stat().st_mode & 0o777 == 0o700, home
    shown = repr(agent.identity)
    assert all(
        form.decode("latin1") not in shown for v in private_values(agent) for form in forms_of(v)
    )
