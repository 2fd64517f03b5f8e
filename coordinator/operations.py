"""What an operator can do, whoever carries the request: no transport and no terminal in here.

Called from several threads, in the process that serves agents or in one that only serves a command.
"""

import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from coordinator.catalogue import Catalogue
from coordinator.config import RunConfig, parse_run_config
from coordinator.membership import Membership, Presence
from coordinator.progress import OpenPhase, ProgressReader, RunProgress, open_phase
from coordinator.published import Published
from coordinator.run_checks import CheckedRun, RunFile, Surroundings, check
from coordinator.run_state import Phase, RunState, Wish
from coordinator.store import RunRecord, Store
from coordinator.summaries import Page, PrivacyReport, RunSummary, page
from fedloom.artifacts import ArtifactReference
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.privacy import PrivacyTerms, privacy_statement

if TYPE_CHECKING:
    from coordinator.export import Model

_ANY_FILE = Path("run.toml")  # stored files were checked when they came: no path in them is used


class Serving(Presence, Protocol):
    """What only the process that serves agents knows of runs."""

    def state_of(self, run_id: bytes) -> RunState | None:
        """Return the run's state while it is executed."""

    def open_run(self) -> bytes | None:
        """Return the id of the run that is executed."""


@dataclass(frozen=True)
class StartedRun:
    """What came of a run file: a run, or the problems that keep it from starting."""

    run: RunSummary | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


class Operations:
    """The operator's side of a coordinator's runs; with its members and its plans."""

    def __init__(
        self,
        store: Store,
        published: Published,
        members: Membership,
        spool: Path,
        authority_is_offline: bool,
        serving: Serving | None = None,
    ) -> None:
        self.members = members
        self.plans = Catalogue(store, published)
        self._store = store
        self._published = published
        self._spool = spool
        self._authority_is_offline = authority_is_offline
        self._serving = serving

    def start_run(self, run_id: bytes, file: RunFile) -> StartedRun:
        """Check the file and queue its run; a repeat with the same id and file changes nothing."""
        if len(run_id) != 16:
            raise Refused(Reason.MALFORMED, f"expected a run id of 16 bytes, found {len(run_id)}")
        if (older := self._started(run_id, file.text)) is not None:
            return older
        found = check(file, self._surroundings())
        if not found.problems:
            reference = self._publish(found)
        if found.problems or found.config is None:
            return StartedRun(None, tuple(found.problems), tuple(found.warnings))
        name = found.config.name
        self._store.add_run(run_id, name, file.text, reference, time.time())
        return StartedRun(self.run(run_id), (), tuple(found.warnings))

    def _started(self, run_id: bytes, text: str) -> StartedRun | None:
        found = next((run for run in self._store.runs() if run.run_id == run_id), None)
        if found is None:
            return None
        if found.config != text:
            raise Refused(Reason.MALFORMED, "expected the file that this run was started with")
        return StartedRun(self._summary(found), (), ())

    def _publish(self, found: CheckedRun) -> ArtifactReference:
        """Make the plan available to agents; what goes wrong becomes one more problem."""
        if found.plan_folder is None:
            data = b"" if found.plan is None else found.plan.encode()
            return self._published.put(iter([data]))
        try:
            return self._published.put_plan(found.plan_folder)[1]
        except (Refused, OSError) as error:
            found.problems.append(f"plan: {found.plan_folder} could not be published: {error}")
            return ArtifactReference(bytes(32), 0)

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            self.members.count(),
            shutil.disk_usage(self._spool.parent).free,
            {run.name: run.run_id.hex() for run in self._store.runs() if not run.phase.over},
            self.plans.known,
        )

    def runs(self, prefix: str, size: int, token: str) -> Page[RunSummary]:
        """List runs, newest first."""
        records = [run for run in self._store.runs() if run.run_id.hex().startswith(prefix)]
        cut = page(reversed(records), lambda run: run.run_id.hex(), size, token)
        return Page(tuple(self._summary(run) for run in cut.items), cut.next_token)

    def run(self, run_id: bytes) -> RunSummary:
        """Return one run; raises Refused(NOT_FOUND)."""
        return self._summary(self._store.run(run_id))

    def wish(self, run_id: bytes, wish: Wish) -> RunSummary:
        """Remember what the operator wants; the process that executes runs looks for it."""
        record = self._store.run(run_id)
        if record.phase.over:
            raise ConfigError(f"run {run_id.hex()}", f"is {self._summary(record).state} already")
        if record.wish is Wish.CANCEL and wish is not Wish.CANCEL:
            raise ConfigError(f"run {run_id.hex()}", "shall be cancelled already")
        self._store.wish(run_id, wish)
        return self.run(run_id)

    def privacy(self, run_id: bytes) -> PrivacyReport:
        """Say what each party learns, from the run's stored terms."""
        record = self._store.run(run_id)
        config = _config(record.config)
        terms = self._privacy_terms(config)
        stated = privacy_statement(terms)
        return PrivacyReport(
            self._summary(record),
            terms.minimum,
            self._authority_is_offline,
            tuple((party, what) for party, what in stated.lines()),
            stated.coordinator_reads,
        )

    def _coordinator_reads(self, config: RunConfig) -> str:
        return privacy_statement(self._privacy_terms(config)).coordinator_reads

    def _privacy_terms(self, config: RunConfig) -> PrivacyTerms:
        return PrivacyTerms(
            config.encoding.protection,
            config.release,
            config.cohort.minimum,
            self._authority_is_offline,
            config.evaluation,
            config.training.groups,
            config.training.sends_labels,
            weighting=config.training.weighting,
            is_asynchronous=config.training.is_asynchronous,
        )

    def watch(self, run_id: bytes, agent_limit: int) -> Callable[[], RunProgress]:
        """Return a function that reads how the run is doing by now."""
        record = self._store.run(run_id)
        reader = ProgressReader(self._store, run_id)
        config = _readable_config(record.config)
        reads = "" if config is None else self._coordinator_reads(config)

        def read() -> RunProgress:
            serving = self._serving
            state = None if serving is None else serving.state_of(run_id)
            run = self.run(run_id)
            return reader.read(run, reads, agent_limit, state, self._open_phase(run, state))

        return read

    def _open_phase(self, run: RunSummary, state: RunState | None) -> OpenPhase | None:
        if self._serving is None or run.phase.over:
            return None
        connected = len(self._serving.connected())
        return open_phase(state, connected, self._serving.open_run())

    def model(self, run_id: bytes) -> "Model":
        """Return the run's model; raises ConfigError where the coordinator cannot read it."""
        from coordinator.export import read_model  # it computes; nothing else here does
        from coordinator.model_facts import run_facts

        record = self._store.run(run_id)
        plan = self.plans.read(record.plan)
        if plan is None:
            raise Refused(Reason.NOT_FOUND, "expected the run's plan among the artifacts")
        config = _config(record.config)
        model = read_model(self._store, self._published, record, config, plan)
        progress = ProgressReader(self._store, run_id).read(self._summary(record), "", 0)
        terms = self._privacy_terms(config)
        facts = run_facts(record, config, terms, progress.history, model.rounds)
        return model.described(plan, facts)

    def _summary(self, record: RunRecord) -> RunSummary:
        config = _readable_config(record.config)
        rounds = self._store.rounds(record.run_id)
        if rounds:
            agents = len(rounds[-1].slots)
        else:
            agents = len(self._store.reports(record.run_id, max(1, record.round)))
        return RunSummary(
            record.run_id,
            record.name,
            record.phase,
            record.reason,
            record.wish,
            record.round,
            len(rounds),
            0 if config is None else config.rounds,
            agents,
            record.created_at,
            record.plan.sha256,
            None if config is None else config.encoding.protection,
            None if config is None else config.release,
            _early_end(record.phase, len(rounds), config),
        )


def _early_end(phase: Phase, completed: int, config: RunConfig | None) -> str:
    """Say why a run is completed before its rounds are done: nothing but a plateau does that."""
    early = phase is Phase.COMPLETED and config is not None and completed < config.rounds
    return str(config.plateau) if early and config is not None else ""


@lru_cache(maxsize=1024)
def _config(text: str) -> RunConfig:
    return parse_run_config(tomllib.loads(text), _ANY_FILE)


def _readable_config(text: str) -> RunConfig | None:
    """One run of an older version must not keep the others from being listed."""
    try:
        return _config(text)
    except ConfigError:
        return None
