"""The sum of one cohort: updates encoded and added one by one, masks out, opened as members do."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import crypto
from coordinator.config import RunConfig
from coordinator.contexts import context_of_cohort
from coordinator.run_state import RunState
from crypto import cohort
from edge_agent.seeds import rounding
from fedloom.errors import ConfigError
from fedloom.plans import Plan
from fedloom.quality import EvaluationTerms, Report
from fedloom.strategies.portions import keeps_own_model, sends_everything
from fedloom.terms import Protection
from simulation.masks import MaskedCohort
from simulation.movers import Trained

_NAMES: dict[Protection, crypto.ProtectionName] = {
    Protection.PLAIN: "plain",
    Protection.MASKED: "masked",
    Protection.ENCRYPTED: "encrypted",
    Protection.SEALED: "sealed",
}

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
        training, aggregation = self.config.training, self.config.aggregation
        for usable, key in (
            (sends_everything(training), "training.lora"),
            (not keeps_own_model(training), "training.personal"),
            (not training.fine_tune_steps, "training.fine_tune_steps"),
            (aggregation.is_mean, "aggregation.rule"),
            (not self.config.plateau.patience, "evaluation.patience"),
        ):
            if not usable:
                raise ConfigError(key, "expected the default: a simulation knows no other yet")
        if not sends_everything(training, self.plan.layout):
            raise ConfigError("plan", "expected one without --residual: a simulation has none yet")


class CohortSum:
    """One cohort's updates: encoded, added, opened."""

    def __init__(
        self, federation: Federation, state: RunState, run_key: crypto.RunKey | None
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
        self._total = self._protection.accumulator(self.context)
        self._encoded = b""
        self._samples, self._loss, self._failed = 0, 0.0, 0

    def add(self, slot: int, trained: Trained) -> bytes:
        """Add a member's update; return the hash of what it would have sent, under masks."""
        name, context = self.members[slot], self.context
        rng = rounding(self._federation.config.training.seed, context.run_id, context.round, name)
        masks = None if self._masked is None else self._masked.masks(name)
        encoder = self._protection.encoder(context, slot, self._run_key, rng, masks)
        encoded = b"".join(encoder.encode(trained.values, trained.weight))
        self._total.add(slot, io.BytesIO(encoded))
        self._samples += trained.samples
        self._loss += trained.samples * trained.mean_loss
        if self._masked is None:
            return b""  # nobody asks for it
        sha256 = hashlib.sha256(encoded).digest()
        self._masked.uploaded(name, sha256)
        return sha256

    def close(self) -> bool:
        """Take the masks out of the sum; False where that cannot be done."""
        correction = None
        if self._masked is not None:
            correction = self._masked.correction()
            if correction is None:
                return False
        self._encoded = b"".join(self._total.result(correction))
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
