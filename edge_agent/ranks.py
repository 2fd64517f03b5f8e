"""HetLoRA on this device (`fedloom.strategies.hetlora`): which rank it trains, what comes of it."""

from dataclasses import dataclass, replace

import numpy as np

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import prunes_rank
from fedloom.adapters import Theta
from fedloom.strategies import Layout, Memory
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.hetlora import factor_norm, pruned_rank, rank_of, tails_of, truncated
from fedloom.strategies.parts import Parts
from fedloom.strategies.tails import size
from fedloom.terms import LocalTraining


@dataclass(frozen=True)
class OwnRank:
    """What this device trains in a round under HetLoRA: the first `rank` ranks of every product."""

    terms: LocalTraining
    layout: Layout
    rank: int

    @classmethod
    def of(cls, terms: LocalTraining, layout: Layout, stated: int, memory: Memory) -> "OwnRank":
        """Return the `stated` rank (0: the plan's), or what is left of it after pruning."""
        most = rank_of(layout)
        rank = min(stated or most, most)
        kept = int(memory[0][0]) if prunes_rank(terms) else 0
        return cls(terms, layout, min(kept or rank, rank))

    def start(self, theta: Theta) -> Theta:
        """Return what is trained: the global model, truncated."""
        return truncated(self.layout, theta, self.rank)

    def parts(self, parts: Parts | None) -> Parts | None:
        """Return the round's parts with the ranks that the penalty weighs on."""
        if parts is None or not prunes_rank(self.terms):
            return parts
        return replace(parts, tails=tails_of(self.layout, self.rank, self.terms.rank_decay))

    def finished(
        self, theta: Theta, start: Theta, update: LocalUpdate
    ) -> tuple[LocalUpdate, Vector | None]:
        """Return the update from the global `theta`, and what the device keeps: its rank (1,)."""
        trained = start + update.delta
        kept, rank = None, self.rank
        if prunes_rank(self.terms):
            tails = tails_of(self.layout, rank, self.terms.rank_decay)
            if size(tails, trained) < size(tails, start):
                rank = pruned_rank(rank, self.terms.rank_decay)
            kept = np.array([rank], np.float32)
        trained = truncated(self.layout, trained, rank)
        found = factor_norm(self.layout, trained)
        delta = np.subtract(trained, theta, out=update.delta)
        return replace(update, delta=delta, factor_norm=found), kept
