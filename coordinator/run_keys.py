"""Which agents hold which run key, and which grant is missing next: no I/O.

A key is made anew for every run, when an agent joins that never had one of the run, when one is
removed, and when a key is spent. Agents need the newest key, and those of the run's history.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Grant:
    """`holder` wraps a key for `recipients`; `fresh`: it makes the key first."""

    holder: str
    key_id: int
    recipients: frozenset[str]
    fresh: bool


@dataclass(frozen=True)
class RunKeys:
    """The keys of one run, as far as the coordinator knows: who was given a wrapped one."""

    latest: int = 0  # number of the key for the next round; 0 before the first
    issued: int = 0  # highest number used; one that was never wrapped is not used again
    holders: Mapping[int, frozenset[str]] = field(default_factory=dict)  # by number of the key
    offered: frozenset[str] = frozenset()  # everyone whom a key was ever to be wrapped for
    stale: bool = False  # no round may begin under the latest key

    def next_grant(self, agents: Set[str], past: Set[int]) -> Grant | None:
        """Return what `agents` lack to open the keys `past` and to take part; None: nothing.

        What nobody here can give is not asked for: see `able`.
        """
        holding = agents & self.holders.get(self.latest, frozenset())
        used = self.latest in past  # something was encrypted under it
        outdated = bool(agents - self.offered) if used else not holding
        if not self.latest or self.stale or outdated:
            return Grant(min(holding or agents), self.issued + 1, frozenset(agents), fresh=True)
        for key_id in sorted({*past, self.latest}):
            givers = agents & self.holders.get(key_id, frozenset())
            lacking = agents - givers
            if givers and lacking:
                return Grant(min(givers), key_id, frozenset(lacking), fresh=False)
        return None

    def able(self, agents: Set[str], past: Set[int]) -> frozenset[str]:
        """Return those of `agents` that hold every key that they need."""
        needed = {*past, self.latest}
        return frozenset(
            agent
            for agent in agents
            if all(agent in self.holders.get(key_id, ()) for key_id in needed)
        )

    def asked(self, grant: Grant) -> "RunKeys":
        """Remember that the grant was asked for."""
        issued = max(self.issued, grant.key_id)
        return replace(self, issued=issued, offered=self.offered | grant.recipients)

    def granted(self, grant: Grant, recipients: Set[str]) -> "RunKeys":
        """Remember for whom the key was wrapped."""
        holders = self.holders.get(grant.key_id, frozenset()) | (recipients & grant.recipients)
        kept = replace(self, holders={**self.holders, grant.key_id: holders})
        return replace(kept, latest=grant.key_id, stale=False) if grant.fresh else kept
