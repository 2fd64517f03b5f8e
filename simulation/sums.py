"""The sum of one cohort: updates encoded and added one by one, masks out, opened as members do."""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import crypto
from coordinator.config import RunConfig
from coordinator.contexts import context_of_cohort, encoded_length
from coordinator.run_state import RunState
from coordinator.strategies.factored_total import FactoredTotal, FactorRound
from crypto import cohort
from edge_agent.seeds import rounding
from fedloom.errors import ConfigError, Refused
from fedloom.plans import Plan, Role
from fedloom.quality import EvaluationTerms, Report
from fedloom.strategies import Memory, ServerState
from fedloom.strategies.compressed import waiting_places
from fedloom.strategies.error_feedback import return_cut
from fedloom.strategies.portions import keeps_own_model
from fedloom.terms import NEEDS_FACTORS, LoraRule, Protection, Strategy
from simulation.masks import MaskedCohort
from simulation.movers import Trained

_NAMES: dict[Protection, crypto.ProtectionName] = {
    Protection.PLAIN: "plain",
    Protection.MASKED: "masked",
    Protection.ENCRYPTED: "encrypted",
    Protection.SEALED: "sealed",
}

_LORA_RULES = (
    LoraRule.FEDIT,
    LoraRule.FFA,
    LoraRule.ROLORA,
    LoraRule.FEDSA,
    LoraRule.FLEXLORA,
)
_CENTRAL = EvaluationTerms(Report.NONE)  # quality is measured on one data set, not by clients


@dataclass(frozen=True)
class RoundReport:
    """What there is to say of a round's training; equal runs give equal reports."""

    round: int
    clients: int  # whose updates are in the sum
    failed: int  # that could not train
    samples: int
    training_loss: float  # mean over the samples of these clients
    saturated: int  # values beyond the clip


@dataclass(frozen=True)
class Federation:
    """What a run's rounds follow from besides the data; `samples` by client."""

    run_id: bytes
    config: RunConfig
    plan: Plan
    samples: Mapping[str, int]

    def __post_init__(self) -> None:
        training = self.config.training
        for usable, key in (
            (training.strategy is not Strategy.FED_MA, "training.strategy"),
            (training.lora in _LORA_RULES, "training.lora"),
            (self.config.aggregation.groups == 1, "aggregation.groups"),
        ):
            if not usable:
                raise ConfigError(key, "expected the default: a simulation knows no other yet")
        if any(tensor.role is Role.RESIDUAL for tensor in self.plan.layout):
            raise ConfigError("plan", "expected one without --residual: a simulation has none yet")
        if training.fine_tune_steps:
            raise ConfigError(
                "training.fine_tune_steps",
                "expected 0: what devices train after the run is in no sum, and a simulation ends "
                f"with the model of all; found {training.fine_tune_steps}",
            )
        try:  # rounds may take turns
            for rounds in (0, 1):
                encoded_length(self.config, self.plan, rounds)
        except Refused as refused:
            raise ConfigError("training", refused.subject) from refused


class CohortSum:
    """One cohort's updates: encoded, added, opened; `before` is the server's state until then."""

    def __init__(
        self,
        federation: Federation,
        state: RunState,
        run_key: crypto.RunKey | None,
        before: ServerState,
    ) -> None:
        config = federation.config
        self._federation = federation
        self._run_key = run_key
        self.members = state.cohort
        self._masked = None
        if config.encoding.protection.has_masks:
            attempt = cohort.AttemptId(federation.run_id, state.round, state.attempt)
            self._masked = MaskedCohort(attempt, config.cohort.minimum, state.cohort)
        digest = b"" if self._masked is None else self._masked.digest
        self.context = context_of_cohort(
            federation.run_id, replace(config, evaluation=_CENTRAL), federation.plan, state, digest
        )
        self._protection = crypto.protection(_NAMES[config.encoding.protection])
        self._spool: TemporaryDirectory[str] | None = None
        self._total = self._new_total(config, before)
        training, size = config.training, federation.plan.parameter_count
        self._places = waiting_places(training, state.completed, size)
        plain = config.encoding.protection is Protection.PLAIN
        self._limit = math.inf if plain else self.context.clip
        self._encoded = b""
        self._samples, self._loss, self._failed = 0, 0.0, 0

    def _new_total(self, config: RunConfig, before: ServerState) -> crypto.Accumulator:
        plan, training = self._federation.plan, config.training
        if config.aggregation.is_mean and training.lora not in NEEDS_FACTORS:
            return self._protection.accumulator(self.context)
        self._spool = TemporaryDirectory(prefix="fedloom-cohort-")
        if training.lora in NEEDS_FACTORS:
            factors = FactorRound(training, plan, before.rounds, lambda: before)
            return FactoredTotal(self.context, factors, self._spooled)
        from coordinator.strategies.robust.total import RobustTotal

        return RobustTotal(self.context, config.aggregation, self._spooled)

    def _spooled(self, slot: int) -> Path:
        """Return where the update of a slot lies for a rule that reads all of them."""
        assert self._spool is not None  # noqa: S101 - the rule is there
        return Path(self._spool.name) / f"{slot}.update"

    def add(self, slot: int, trained: Trained) -> bytes:
        """Add a member's update; return the hash of what it would have sent, under masks."""
        name, context = self.members[slot], self.context
        rng = rounding(self._federation.config.training.seed, context.run_id, context.round, name)
        masks = None if self._masked is None else self._masked.masks(name)
        encoder = self._protection.encoder(context, slot, self._run_key, rng, masks)
        encoded = b"".join(encoder.encode(trained.values, trained.weight))
        if self._spool is not None:
            self._spooled(slot).write_bytes(encoded)
        self._total.add(slot, io.BytesIO(encoded))
        self._samples += trained.samples
        self._loss += trained.samples * trained.mean_loss
        if self._masked is None:
            return b""  # nobody asks for it
        sha256 = hashlib.sha256(encoded).digest()
        self._masked.uploaded(name, sha256)
        return sha256

    def remembered(self, trained: Trained) -> Memory:
        """Return what a member remembers once its update is in the sum."""
        if self._places is None:
            return trained.memory
        memory = trained.memory
        waits = len(memory) - 1 - keeps_own_model(self._federation.config.training)
        left = memory[waits].copy()
        return_cut(left, self._places, trained.values, self._limit)
        return (*memory[:waits], left, *memory[waits + 1 :])

    def close(self) -> bool:
        """Take the masks out of the sum; False where that cannot be done."""
        correction = None
        if self._masked is not None:
            correction = self._masked.correction()
            if correction is None:
                return False
        self._encoded = b"".join(self._total.result(correction))
        if self._spool is not None:
            self._spool.cleanup()
        return True

    def opened(self) -> crypto.OpenedSum:
        """Open the sum as every member would."""
        source = io.BytesIO(self._encoded)
        return self._protection.open_sum(self.context, self._run_key, self._total.members, source)

    def report(self, number: int) -> RoundReport:
        """Return what the members' training came to."""
        added = len(self._total.members)
        failed = len(self.members) - added
        return RoundReport(number, added, failed, self._samples, self._loss / self._samples, 0)
