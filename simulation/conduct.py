"""A round with all its agents in one process: `coordinator.rounds` decides, and this obeys.

    rounds.handle ──effects──▶ Invite         every invited client says READY: its weight is known
         ▲                     OpenCohort     crew trains ─▶ encoder ─▶ accumulator, slot by slot
         └──────events──────── CloseCohort    the sum, without its masks
                               PublishResult  opened once, applied once: all agents would get equal

Nothing waits and no clock runs: nobody is late. A client that cannot train is found out after its
cohort was formed, and declines then; a device would have before. Updates are encoded, added and
forgotten one by one in the order of their slots, whoever trained them: under `plain`, whose sums
are of floats, that order is part of the result, and elsewhere sums are of integers.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import crypto
from coordinator import events
from coordinator.phases.gathering import start_gathering
from coordinator.rounds import handle
from coordinator.run_state import RunState
from edge_agent.global_state import LastRound
from edge_agent.seeds import order_seed
from fedloom.errors import Reason, Refused
from fedloom.schedules import round_terms
from fedloom.strategies import ServerState, algorithm
from fedloom.terms import weight_class, weight_of
from simulation.memories import Memories
from simulation.movers import Crew, Task
from simulation.sums import CohortSum, Federation, RoundReport

_NOW = 0.0  # of a clock that stands: no deadline passes


@dataclass(frozen=True)
class Progress:
    """Where a federation stands between two rounds."""

    server: ServerState
    last: LastRound = field(default_factory=LastRound)


Watch = Callable[[int, int], None]  # (clients done, clients of the round)


def conduct_round(
    federation: Federation,
    progress: Progress,
    crew: Crew,
    memories: Memories,
    watch: Watch = lambda done, of: None,
) -> tuple[Progress, RoundReport]:
    """Conduct the next round to its end; raises Refused with the reason of a run that fails."""
    return _Round(federation, progress, crew, memories, watch).conduct()


class _Round:
    """One round, and the ones before it that were void."""

    def __init__(
        self,
        federation: Federation,
        progress: Progress,
        crew: Crew,
        memories: Memories,
        watch: Watch,
    ) -> None:
        self._federation = federation
        self._config = federation.config
        self._before = progress
        self._crew = crew
        self._memories = memories
        self._watch = watch
        self._after: Progress | None = None
        self._report: RoundReport | None = None
        self._sum: CohortSum | None = None
        self._run_key = (
            crypto.generate_run_key() if self._config.encoding.protection.has_run_key else None
        )
        begun = RunState(
            policy=self._config.policy,
            deadline=_NOW + self._config.deadlines.gathering,
            round=progress.last.round + 1,
            previous_round=progress.last.round,
            completed=progress.server.rounds,
            clip=progress.last.next_clip,
            connected=frozenset(federation.samples),
        )
        self._state, effects = start_gathering(begun, _NOW)
        self._todo: deque[events.Effect] = deque(effects)

    def conduct(self) -> tuple[Progress, RoundReport]:
        """Do what the state machine wants until the round is history."""
        while self._after is None or self._report is None or not self._closed():
            if not self._todo:
                raise Refused(
                    Reason.QUORUM_NOT_REACHED,
                    f"expected at least cohort.minimum = {self._config.cohort.minimum} clients, "
                    f"found {len(self._federation.samples)}",
                )
            self._obey(self._todo.popleft())
        return self._after, self._report

    def _closed(self) -> bool:
        return self._state.previous_round > self._before.last.round

    def _post(self, event: events.Event) -> None:
        self._state, effects = handle(self._state, event, _NOW)
        self._todo.extend(effects)

    def _obey(self, effect: events.Effect) -> None:  # noqa: C901 - one arm per effect
        match effect:
            case events.ShareKey(grant):
                # The key itself stays in this process: there is nobody to wrap it for.
                envelopes = dict.fromkeys(grant.recipients, b"")
                self._post(events.KeyShared(grant.holder, grant.key_id, envelopes))
            case events.Invite(agents):
                self._answer(agents)
            case events.OpenCohort():
                self._collect()
            case events.CloseCohort():
                self._store()
            case events.PublishResult(agents):
                self._apply(agents)
            case events.AskForSum(agent):
                self._post(events.SumReturned(agent))
            case events.FinishRun():
                if self._state.reason is not None:
                    raise Refused(self._state.reason, f"in round {self._state.round}")
            case events.AbandonRound():
                self._abandon()
            case events.CloseRound() | events.RepeatCohort() | events.Reject():
                pass

    def _answer(self, invited: Collection[str]) -> None:
        """Let clients be ready in an order that the seed draws: with a quorum it matters."""
        text = f"{self._config.training.seed}/{self._state.round}/ready"
        order = random.Random(text).sample(sorted(invited), len(invited))  # noqa: S311
        for name in order:
            if name in self._state.invited:
                weight = weight_of(self._config.training, self._federation.samples[name])
                self._post(events.Ready(name, self._state.round, weight_class(weight)))

    def _collect(self) -> None:
        config, state = self._config, self._state
        self._sum = CohortSum(self._federation, state, self._run_key, self._before.server)
        terms = round_terms(config.training, self._before.server.rounds, config.rounds)
        self._crew.begin(self._before.server, terms)
        members, done = state.cohort, 0
        groups = self._groups(members)
        for outcomes in self._crew.trained(groups):
            for outcome in outcomes:
                name = members[done]
                done += 1
                if isinstance(outcome, Refused):
                    self._post(events.Declined(name, state.round, outcome.reason))
                else:
                    sha256 = self._sum.add(done - 1, outcome)
                    self._memories.propose(name, state.round, self._sum.remembered(outcome))
                    self._post(events.Uploaded(name, sha256))
                self._watch(done, len(members))

    def _groups(self, members: Sequence[str]) -> Iterator[list[Task]]:
        run, number = self._federation, self._state.round
        seed, size = self._config.training.seed, self._crew.group
        for start in range(0, len(members), size):
            yield [
                Task(
                    name,
                    order_seed(seed, run.run_id, number, name),
                    self._memories.read(name, self._before.last.round, self._before.server.theta),
                )
                for name in members[start : start + size]
            ]

    def _store(self) -> None:
        stored = self._sum is not None and self._sum.close()
        self._post(events.SumStored() if stored else events.SumFailed())

    def _abandon(self) -> None:
        if self._sum is not None:
            self._memories.forget(self._sum.members, self._sum.context.round)
            self._sum = None

    def _apply(self, agents: Collection[str]) -> None:
        assert self._sum is not None  # noqa: S101 - there is a sum to publish
        opened, number = self._sum.opened(), self._state.round
        context, report = self._sum.context, self._sum.report(number)
        stated = self._config.encoding.clip or not opened.exponents
        last = LastRound(
            number,
            self._state.attempt,
            opened.saturated,
            0.0 if stated else crypto.next_clip(context.clip, opened.exponents),
        )
        rule = algorithm(self._config.training, self._federation.plan.layout)
        server = rule.apply(self._before.server, opened.mean, opened.count)
        self._after = Progress(server, last)
        self._report = replace(report, saturated=opened.saturated)
        digest = hashlib.sha256(server.theta.data).digest()
        for agent in sorted(agents):
            self._post(events.Applied(agent, number, digest, next_clip=last.next_clip))
