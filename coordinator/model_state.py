"""The global model where the coordinator can read it: the plan's adapter, then every round's sum.

The same operations as on every agent, on the same bytes. Nothing is kept on disk: the sums are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import crypto
from coordinator.config import RunConfig
from coordinator.contexts import context_of_round
from coordinator.published import Published
from coordinator.store import RoundRecord
from crypto import groups, masked
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE, Plan
from fedloom.strategies import ServerState as ModelState
from fedloom.strategies import algorithm
from fedloom.strategies.grouped import combined
from fedloom.terms import Protection

__all__ = ["ModelState", "RunModel"]


@dataclass
class RunModel:
    """The model of one run, at the last round that was asked for."""

    published: Published
    run_id: bytes
    config: RunConfig
    plan: Plan
    _state: ModelState | None = field(default=None, init=False)

    def after(self, rounds: Sequence[RoundRecord]) -> ModelState:
        """Return the state after these rounds of the run's history, which ascend from the first.

        What was asked for before is gone on from. Raises Refused for sums that are not here.
        """
        rule = algorithm(self.config.training, self.plan.layout)
        with TemporaryDirectory(prefix="fedloom-model-") as name:
            scratch = Path(name) / "artifact"
            state = self._state
            if state is None or state.rounds > len(rounds):
                self.published.fetch(self.plan.member(ADAPTER_FILE).sha256, scratch)
                state = rule.init(read_adapter(scratch, self.plan.layout))
            for record in rounds[state.rounds :]:
                context = context_of_round(
                    self.run_id, self.config, self.plan, record, state.rounds
                )
                opened = self._read_sum(context, record, scratch)
                sent = opened.mean[: len(opened.mean) - context.tail_length]
                state = rule.apply(state, sent, opened.count)
        self._state = state
        return state

    def _read_sum(
        self, context: crypto.UpdateContext, record: RoundRecord, scratch: Path
    ) -> crypto.OpenedSum:
        """Open a sum as only a coordinator that may read it can: nothing proves whose it is."""
        reference = record.sum if record.opened is None else record.opened
        scratch.unlink(missing_ok=True)
        self.published.fetch(reference.sha256, scratch)

        def open_one(members: Sequence[int], source: crypto.Source) -> crypto.OpenedSum:
            if self.config.encoding.protection is Protection.MASKED:
                return masked.read_sum(context, members, source)
            plain = replace(context, cohort=b"")  # opened sums belong to no cohort's masks
            return crypto.protection("plain").open_sum(plain, None, members, source)

        training = self.config.training
        with scratch.open("rb") as file:
            if not training.groups or record.opened is not None:  # agents return what they made
                return open_one(record.slots, file)
            rule, tail = partial(combined, training), context.tail_length
            return groups.open_sums(record.slots, training.groups, file, open_one, rule, tail)
