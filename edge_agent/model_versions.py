"""The models that this device made: a folder for each adapter, in it a folder for each version.

    models/intent/active          {"version": 7, "held": false}
    models/intent/7/              an exported model (fedloom/exports.py) with its signed statement
    models/intent/8/              refused: the statement alone, so that there is nothing to activate

Versions of one plan share every file but the adapter by hard links. A version is whole when it has
its name; the pointer moves by one rename, and whoever answers looks at it for every request.
"""

import json
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_agent.engine import Evaluation
from edge_agent.statements import Statement, read_statement, write_statement
from fedloom.adapters import Theta
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.exports import export_model
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan
from fedloom.secret_files import write_secret

DEFAULT_KEPT = 5
MAX_KEPT = 1_000
_POINTER = "active"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_UNUSABLE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Active:
    """The version that answers; `held`: a person chose it, and newer ones do not replace it."""

    version: int
    held: bool = False


@dataclass(frozen=True)
class Candidate:
    """A model as a round left it."""

    plan_folder: Path
    plan: Plan
    theta: Theta
    run_id: bytes
    round: int
    evaluation: Evaluation | None = None
    refused: str = ""  # why it must not answer

    @property
    def plan_sha256(self) -> str:
        """The plan's id, hexadecimal."""
        return sha256((self.plan_folder / PLAN_FILE).read_bytes()).hexdigest()


def adapter_name(plan: Plan) -> str:
    """Return the name under which a plan's models are kept: the plan's, as a file name."""
    return _UNUSABLE.sub("-", plan.name).strip(".-")[:64] or "model"


class ModelVersions:
    """All versions of all adapters on this device; only versions that it signed count."""

    def __init__(self, folder: Path, key: Ed25519PublicKey) -> None:
        self.folder = folder
        self._key = key

    def adapters(self) -> list[str]:
        """Return the names of all adapters, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if self._numbers(path.name))

    def versions(self, adapter: str) -> list[Statement | Refused]:
        """Return every version's statement, oldest first; one that is not ours as its refusal."""
        found: list[Statement | Refused] = []
        for number in self._numbers(adapter):
            try:
                found.append(self.statement(adapter, number))
            except Refused as refused:
                found.append(refused)
        return found

    def statement(self, adapter: str, version: int) -> Statement:
        """Return what we signed of a version; raises Refused(PLAN_MISMATCH)."""
        said = read_statement(self.path(adapter, version), self._key)
        if (said.adapter, said.version) != (adapter, version):
            raise Refused(
                Reason.PLAN_MISMATCH,
                f"expected version {version} of {adapter}, found a signed copy of version "
                f"{said.version} of {said.adapter}",
            )
        return said

    def path(self, adapter: str, version: int) -> Path:
        """Return the folder of a version."""
        return self.folder / adapter / str(version)

    def pointer(self, adapter: str) -> Path:
        """Return the file that names the active version: whoever serves watches it."""
        return self.folder / adapter / _POINTER

    def active(self, adapter: str) -> Active | None:
        """Return the version that answers; None when there is none."""
        try:
            values = json.loads(self.pointer(adapter).read_text())
            return Active(int(values["version"]), bool(values["held"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                str(self.pointer(adapter)),
                "expected the active version; choose one: fedloom-agent models rollback VERSION",
            ) from error

    def active_statement(self, adapter: str) -> Statement | None:
        """Return what was signed of the active version; None when there is none that is ours."""
        try:
            active = self.active(adapter)
            return self.statement(adapter, active.version) if active else None
        except (ConfigError, Refused):
            return None

    def activate(self, adapter: str, chosen: Active) -> Statement:
        """Make a version answer; raises Refused when it was refused or is not ours."""
        said = self.statement(adapter, chosen.version)
        if said.refused:
            raise Refused(
                Reason.NOT_PERMITTED,
                f"expected a version that may answer, found {chosen.version}: {said.refused}",
            )
        values = {"version": chosen.version, "held": chosen.held}
        write_secret(self.pointer(adapter), json.dumps(values).encode())
        return said

    def usable(self, adapter: str) -> list[int]:
        """Return the versions that may answer, oldest first."""
        found = self.versions(adapter)
        return [said.version for said in found if isinstance(said, Statement) and not said.refused]

    def of_round(self, adapter: str, run_id: bytes, round_number: int) -> Statement | None:
        """Return the version that a round made; None when it has made none."""
        for said in reversed(self.versions(adapter)):
            if isinstance(said, Statement) and (said.run, said.round) == (
                run_id.hex(),
                round_number,
            ):
                return said
        return None

    def _numbers(self, adapter: str) -> list[int]:
        folder = self.folder / adapter
        if adapter.startswith(".") or not folder.is_dir():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if _VERSION.fullmatch(path.name))


class ModelMaker(ModelVersions):
    """Adds versions: the running agent's part."""

    def __init__(
        self, folder: Path, agent_id: str, key: Ed25519PrivateKey, kept: int = DEFAULT_KEPT
    ) -> None:
        super().__init__(folder, key.public_key())
        self._agent_id = agent_id
        self._signing_key = key
        self._kept = kept

    def add(self, candidate: Candidate) -> Statement:
        """Keep a model as the newest version; it answers from now on unless refused or held off."""
        name = adapter_name(candidate.plan)
        number = max(self._numbers(name), default=0) + 1
        final = self.path(name, number)
        final.parent.mkdir(parents=True, exist_ok=True)
        for rest in final.parent.glob(".*/"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        partial = final.with_name(f".{number}.{secrets.token_hex(4)}")
        try:
            adapter_sha256 = self._write_files(candidate, partial)
            said = Statement(
                name,
                number,
                self._agent_id,
                candidate.run_id.hex(),
                candidate.round,
                candidate.plan_sha256,
                adapter_sha256,
                datetime.now(UTC).isoformat(timespec="seconds"),
                candidate.evaluation,
                candidate.refused,
            )
            write_statement(partial, said, self._signing_key)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        active = self._standing(name)
        if not said.refused and not (active and active.held):
            self.activate(name, Active(number))
        self._prune(name)
        return said

    def _standing(self, name: str) -> Active | None:
        """Return the version that answers; a damaged pointer is replaced by the next version's."""
        try:
            return self.active(name)
        except ConfigError:
            return None

    @staticmethod
    def _write_files(candidate: Candidate, folder: Path) -> str:
        """Return the SHA-256 of the adapter's file; a refused version has none."""
        if candidate.refused:
            folder.mkdir()
            return ""
        export_model(candidate.plan_folder, candidate.plan, candidate.theta, folder)
        with (folder / ADAPTER_FILE).open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def _prune(self, name: str) -> None:
        """Delete all but the newest ones, the last one of each of as many runs, and the active."""
        numbers = self._numbers(name)
        last_of_run = {
            said.run: said.version
            for said in self.versions(name)
            if isinstance(said, Statement) and not said.refused
        }
        kept = {*numbers[-self._kept :], *sorted(last_of_run.values())[-self._kept :]}
        if active := self._standing(name):
            kept.add(active.version)
        for number in set(numbers) - kept:
            shutil.rmtree(self.path(name, number), ignore_errors=True)
