"""How long an event loop waits while a cohort agrees on masks and gives them up.

    python benchmarks/cohort_steps.py [--members 100] [--vanish 21] [--json]

The product's own steps, `coordinator.masking` and `edge_agent.masking`, with real certificates and
signatures, in one process: messages go from hand to hand, members follow them one after another,
the relay is told what all members say at once. Some members vanish after their upload. For each
step: how often it was taken, the wall time of the longest, the longest time between two ticks of
1 ms meanwhile, and the most CPU time that this process used between two ticks: the part of a wait
that other processes have nothing to do with. To compare: a loop with nothing beside it, and one
beside a thread that only counts, for 50 ms at a time.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.sealed_steps import IDLE_SECONDS, waits
from coordinator.candidates import Candidates
from coordinator.certificates import Issuer, new_key
from coordinator.events import Ready
from coordinator.masking import Masking as Relay
from coordinator.metrics import Metrics
from crypto import cohort
from edge_agent.identity import Identity
from edge_agent.masking import Masking as Member
from fedloom.v1 import control_pb2

RUN_ID = bytes(range(16))
ATTEMPT = cohort.AttemptId(RUN_ID, 1, 1)
TARGET_MS = 20.0


@dataclass
class Taken:
    """A step as it was taken so far."""

    step: str
    times: int = 0
    wall_ms: float = 0.0
    wait_ms: float = 0.0
    cpu_ms: float = 0.0


class Watch:
    """Ticks while steps are taken."""

    def __init__(self) -> None:
        self.rows: dict[str, Taken] = {}

    async def take(self, step: str, *actions: Awaitable[Any]) -> list[Any]:
        """Take a step, by all who take it at once, and return what comes of it."""
        gc.freeze()  # a device has its own state in memory, not those of all members
        taking = asyncio.gather(*actions)
        found = await waits(taking)
        row = self.rows.setdefault(step, Taken(step))
        row.times += 1
        row.wall_ms = max(row.wall_ms, float(found[:, 0].sum()))
        row.wait_ms = max(row.wait_ms, float(found[:, 0].max()))
        row.cpu_ms = max(row.cpu_ms, float(found[:, 1].max()))
        return list(taking.result())


def identities(count: int) -> list[Identity]:
    """Make devices that have joined."""
    authority = Issuer.new_root(0)
    made = []
    for i in range(count):
        key, name = new_key(), f"agent-{i:04}"
        made.append(
            Identity(
                name,
                "coordinator:7070",
                key,
                authority.agent(key.public_key(), name),
                authority.certificate,
                X25519PrivateKey.generate(),
                Ed25519PrivateKey.generate(),
            )
        )
    return made


class Attempt:
    """One attempt, step by step."""

    def __init__(self, count: int, folder: Path, watch: Watch) -> None:
        self.watch = watch
        self.devices = identities(count)
        self.members = {}
        for device in self.devices:
            place = folder / device.agent_id
            place.mkdir()
            self.members[device.agent_id] = Member(place, device, RUN_ID, 3)
        self.told: dict[str, bytes] = {}  # what the relay has told each member last
        self.journal: list[tuple[str, bytes]] = []

    async def form(self) -> control_pb2.Cohort:
        """Have all members advertise, and form their cohort."""
        candidates = Candidates(self.devices[0].authority)
        readies = []
        for device in self.devices:
            advertise = self.members[device.agent_id].advertise(1, 1)
            [advertisement] = await self.watch.take("member: invitation", advertise)
            identity = device.advertised_identity_key().SerializeToString()
            readies.append(Ready(device.agent_id, 1, 4, 0.0, 0.0, advertisement, identity))
        await self.watch.take("relay: all READY", *(candidates.check(r, ATTEMPT) for r in readies))
        [self.relay] = await self.watch.take("relay: cohort", self._opened(candidates, readies))
        return control_pb2.Cohort(
            mask_cohort=self.relay.encoded_cohort, identities=self.relay.identities
        )

    async def _opened(self, candidates: Candidates, readies: list[Ready]) -> Relay:
        for ready in readies:
            candidates.keep(ready)
        of = candidates.of(self.members)
        remember = lambda agent, message: self.journal.append((agent, message))  # noqa: E731
        return Relay(ATTEMPT, 3, of, self.told.__setitem__, remember, Metrics())

    async def tell_members(self, step: str, names: list[str]) -> dict[str, bytes]:
        """Let members follow what the relay has told them; return their answers."""
        answers = {}
        for name in names:
            heard = self.members[name].heard(self.told[name])
            [answers[name]] = await self.watch.take(f"member: {step}", heard)
        return answers

    async def tell_relay(self, step: str, answers: dict[str, bytes]) -> None:
        """Let all members answer at once."""
        heard = (self.relay.heard(name, answer) for name, answer in answers.items())
        await self.watch.take(f"relay: {step}", *heard)


async def _taken(count: int, vanish: int, folder: Path) -> list[Taken]:
    """Take every step of one attempt."""
    watch = Watch()
    await watch.take("idle", asyncio.sleep(IDLE_SECONDS))
    for _ in range(count):
        await watch.take("counting thread", asyncio.to_thread(_counting, 0.05))
    attempt = Attempt(count, folder, watch)
    message, names = await attempt.form(), list(attempt.members)
    boxes = {}
    for name, member in attempt.members.items():
        [boxes[name]] = await watch.take("member: cohort", member.take_up(message))
    await attempt.tell_relay("all boxes", boxes)
    await attempt.tell_members("boxes", names)
    for slot, (name, member) in enumerate(attempt.members.items()):
        await watch.take("member: masks", asyncio.to_thread(member.masks))
        sha256 = hashlib.sha256(name.encode()).digest()
        await watch.take("member: upload", member.fix_upload(sha256))
        attempt.relay.counted(slot, sha256)
    attempt.relay.close_uploads()
    await watch.take("relay: all uploads", attempt.relay.idle())
    staying = names[: count - vanish]
    endorsements = await attempt.tell_members("accepted list", staying)
    await attempt.tell_relay("endorsements", endorsements)
    releases = await attempt.tell_members("certificate", staying)
    await attempt.tell_relay("releases", releases)
    [correction] = await watch.take("relay: correction", attempt.relay.settled(0.0))
    assert correction is not None and len(correction.masks) == count  # noqa: S101, PT018
    attempt.relay.close()
    return list(watch.rows.values())


def _counting(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def show(rows: list[Taken]) -> None:
    """Print a table."""
    print(f"{'step':<24}{'times':>8}{'wall ms':>10}{'longest wait':>14}{'of it CPU':>12}")
    for r in rows:
        print(f"{r.step:<24}{r.times:>8}{r.wall_ms:>10.1f}{r.wait_ms:>14.1f}{r.cpu_ms:>12.1f}")
    print(f"longest waits (target <= {TARGET_MS:.0f} ms):")
    for side in ("idle", "counting", "relay", "member"):
        mine = [r for r in rows if r.step.startswith(side)]
        wait, cpu = max(mine, key=lambda r: r.wait_ms), max(mine, key=lambda r: r.cpu_ms)
        print(f"{wait.step} {wait.wait_ms:.1f} ms; CPU: {cpu.step} {cpu.cpu_ms:.1f} ms")


def measured(count: int, vanish: int) -> list[Taken]:
    """Return a row for each step."""
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as folder:
        return asyncio.run(_taken(count, vanish, Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--vanish", type=int, default=21)
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    options = parser.parse_args()
    rows = measured(options.members, options.vanish)
    if options.json:
        for row in rows:
            print(json.dumps(row.__dict__))
    else:
        print(f"{options.members} members, {options.vanish} vanish after their upload\n")
        show(rows)


if __name__ == "__main__":
    main()
