"""The adapters that this process answers with: loaded once, shared by plan, swapped while it runs.

A plan has one session whatever the number of its adapters; a new version costs its theta. Whoever
asks gets the version that is active now and keeps it until his request is done.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import file_digest, sha256
from pathlib import Path

import structlog

from edge_agent.inference import Adapter, Model, load_model, read_theta
from edge_agent.model_versions import ModelVersions
from edge_agent.statements import Statement
from fedloom.errors import ConfigError, FedloomError, Reason, Refused
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, parse_plan, verify_members

_log = structlog.get_logger()
_Stamp = tuple[int, int]  # of the pointer's file: which one it is, and when it was written
ModelLoader = Callable[[Path, Plan, int], Model]


class Library:
    """Adapters by name. `adapter` may be called from several threads."""

    def __init__(
        self, versions: ModelVersions, threads: int = 0, load: ModelLoader = load_model
    ) -> None:
        self._versions = versions
        self._threads = threads
        self._load = load
        self._lock = threading.Lock()  # one thread loads; the others wait for what it loads
        self._loaded: dict[str, tuple[_Stamp, Adapter]] = {}
        self._plans: dict[str, tuple[Plan, Model]] = {}  # by the plan's SHA-256

    def names(self) -> list[str]:
        """Return the names of the adapters that have an active version."""
        return [name for name in self._versions.adapters() if self._stamp(name)]

    def only_name(self) -> str:
        """Return the name of the one adapter; raises ConfigError that lists them."""
        names = self.names()
        if len(names) != 1:
            raise ConfigError(
                "adapter",
                f"expected the name of one of the adapters {names}"
                if names
                else f"expected a model in {self._versions.folder}: finish a round first",
            )
        return names[0]

    def adapter(self, name: str) -> Adapter:
        """Return the active version; the one before while the active one cannot be loaded.

        Raises ConfigError for a name that no adapter has, and Refused for a version that is not as
        this device signed it, where there was none before.
        """
        with self._lock:
            stamp = self._stamp(name)
            before = self._loaded.get(name)
            if before is not None and stamp in (before[0], None):
                return before[1]
            if stamp is None:
                raise ConfigError("adapter", f"expected one of {self.names()}, found {name!r}")
            try:
                loaded = self._load_active(name)
            except FedloomError as error:
                if before is None:
                    raise
                _log.warning("version not loaded", adapter=name, problem=str(error))
                loaded = before[1]
            if before is not None and loaded is not before[1]:
                _log.info("adapter replaced", adapter=name, version=loaded.version)
            self._loaded[name] = (stamp, loaded)
            self._forget_plans()
            return loaded

    def _load_active(self, name: str) -> Adapter:
        active = self._versions.active(name)
        if active is None:
            raise Refused(Reason.NOT_FOUND, f"expected an active version of {name}, found none")
        said = self._versions.statement(name, active.version)
        folder = self._versions.path(name, active.version)
        plan, model = self._plan(folder, said)
        return Adapter(name, said.version, plan, read_theta(folder, plan), model)

    def _plan(self, folder: Path, said: Statement) -> tuple[Plan, Model]:
        """Return the plan's model, loaded once; every file has its hash compared before."""
        if said.plan in self._plans:
            verified_plan(folder, said)
        else:
            plan = verified_files(folder, said)
            self._plans[said.plan] = (plan, self._load(folder, plan, self._threads))
        return self._plans[said.plan]

    def _forget_plans(self) -> None:
        used = {id(adapter.model) for _, adapter in self._loaded.values()}
        for digest in [d for d, (_, model) in self._plans.items() if id(model) not in used]:
            del self._plans[digest]

    def _stamp(self, name: str) -> _Stamp | None:
        if name not in self._loaded and name not in self._versions.adapters():
            return None  # a foreign name must not become a path
        try:
            found = self._versions.pointer(name).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def verified_files(folder: Path, said: Statement) -> Plan:
    """Return a version's plan once every file is the one that was signed; raises Refused."""
    plan = verified_plan(folder, said)
    verify_members(_present(plan, folder), folder)
    return plan


def _present(plan: Plan, folder: Path) -> Plan:
    """Return the plan with the members that an exported model has: those that answer."""
    present = tuple(member for member in plan.members if (folder / member.name).exists())
    return replace(plan, members=tuple(m for m in present if m.name != ADAPTER_FILE))


def verified_plan(folder: Path, said: Statement) -> Plan:
    """Return a version's plan once plan and adapter are those that were signed.

    Raises Refused: NOT_PERMITTED for a version that was refused, PLAN_MISMATCH.
    """
    if said.refused:
        raise Refused(
            Reason.NOT_PERMITTED, f"version {said.version} must not answer: {said.refused}"
        )
    try:
        content = (folder / PLAN_FILE).read_bytes()
        with (folder / ADAPTER_FILE).open("rb") as file:
            adapter = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH,
            f"expected the files of version {said.version}: {error.strerror}",
        ) from error
    for name, expected, found in (
        (PLAN_FILE, said.plan, sha256(content).hexdigest()),
        (ADAPTER_FILE, said.adapter_sha256, adapter),
    ):
        if found != expected:
            raise Refused(
                Reason.PLAN_MISMATCH,
                f"expected {name} of version {said.version} with SHA-256 {expected}, as this "
                f"device signed it, found {found}",
            )
    return parse_plan(content)
