"""The relay's steps: in turn, remembered before they are acted upon, and the same when replayed."""

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.candidates import Candidate
from coordinator.faults import StorageFault
from coordinator.masking import Masking
from coordinator.metrics import Metrics
from crypto import cohort
from crypto.errors import IllegalStep
from crypto.masks import Correction
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.integration.engines import Gate

RUN = bytes(range(16))
ATTEMPT = cohort.AttemptId(RUN, 1, 1)
NAMES = ("a", "b", "c", "d", "e")
METRICS = Metrics()


class Device:
    """A member, as its device is."""

    def __init__(self, name: str) -> None:
        identity = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        self.name = name
        self.public = identity.public_key().public_bytes_raw()
        signer = cohort.ed25519_signer(identity)
        self._tools = cohort.MemberTools(signer, lambda *_: True)  # others are the relay's to doubt
        self._state = cohort.new_member(name, RUN)
        joined = self.take(cohort.Join(ATTEMPT, hashlib.sha256(b"s" + name.encode()).digest()))
        assert isinstance(joined, cohort.Advertisement)
        self.candidate = Candidate(joined, control_pb2.IdentityKey(public_key=self.public))

    def take(self, event: cohort.MemberEvent) -> Any:
        self._state, answer = cohort.handle_member(self._state, event, self._tools)
        return answer

    def upload(self) -> bytes:
        sha256 = hashlib.sha256(self.name.encode()).digest()
        self.take(cohort.UploadReady(ATTEMPT, sha256))
        return sha256


Entry = tuple[str, str, bytes]  # (what, agent, message)


class Desk:
    """A relay, what it wrote to the journal and what it told members, in one list."""

    def __init__(self) -> None:
        self.devices = {name: Device(name) for name in NAMES}
        self.log: list[Entry] = []
        self.full = False
        self.masking = self.relay(self.log)

    def relay(self, log: list[Entry]) -> Masking:
        def remember(agent: str, message: bytes) -> None:
            if self.full:
                raise StorageFault("journal", "full")
            log.append(("heard", agent, message))

        candidates = {name: device.candidate for name, device in self.devices.items()}
        told = lambda agent, message: log.append(("told", agent, message))  # noqa: E731
        return Masking(ATTEMPT, 3, candidates, told, remember, METRICS)

    def boxes(self) -> dict[str, bytes]:
        return {n: d.take(self.masking.cohort).encode() for n, d in self.devices.items()}

    def told(self, kind: type[cohort.Message]) -> dict[str, cohort.Message]:
        """Return what each member was told last of this kind."""
        messages = [(agent, cohort.decode(m)) for what, agent, m in self.log if what == "told"]
        return {agent: message for agent, message in messages if isinstance(message, kind)}

    def answers(self, kind: type[cohort.Message]) -> dict[str, bytes]:
        """Let members follow it."""
        followed = {a: self.devices[a].take(message) for a, message in self.told(kind).items()}
        return {agent: answer.encode() for agent, answer in followed.items() if answer is not None}

    async def hear(self, messages: Iterable[tuple[str, bytes]]) -> None:
        await asyncio.gather(*(self.masking.heard(agent, message) for agent, message in messages))

    async def collect(self) -> None:
        """Deal and upload; then no update is taken any more."""
        await self.hear(self.boxes().items())
        self.answers(cohort.Boxes)
        for slot, device in enumerate(self.devices.values()):
            sha256 = device.upload()
            self.log.append(("counted", str(slot), sha256))  # as the run's own journal has it
            self.masking.counted(slot, sha256)
        self.log.append(("closed", "", b""))
        self.masking.close_uploads()
        await self.masking.idle()

    async def replayed(self) -> Masking:
        """Return the relay of a coordinator that was started again."""
        again = self.relay([])
        for what, agent, message in self.log:
            match what:
                case "heard":
                    await again.heard(agent, message)
                case "counted":
                    again.counted(int(agent), message)
                case "closed":
                    again.close_uploads()
        await again.idle()
        return again


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 1))
def test_the_journal_leads_to_the_same_correction_in_any_order(random: Any, gone: int) -> None:
    async def attempt() -> None:
        desk = Desk()
        await desk.collect()
        staying = random.sample(NAMES, len(NAMES) - gone)  # who is not there vanished

        def shuffled(answers: dict[str, bytes]) -> list[tuple[str, bytes]]:
            messages = [(agent, m) for agent, m in answers.items() if agent in staying]
            messages += random.choices(messages, k=2)  # repeated after a lost connection
            random.shuffle(messages)
            return messages

        await desk.hear(shuffled(desk.answers(cohort.Acceptance)))
        await desk.hear(shuffled(desk.answers(cohort.Certificate)))
        correction = await desk.masking.settled(0.0 if gone else 60.0)
        assert isinstance(correction, Correction)
        assert len(correction.masks) == len(NAMES)
        again = await desk.replayed()
        assert await again.settled(0.0) == correction
        check_order(desk.log)
        desk.masking.close()
        again.close()

    asyncio.run(attempt())


def check_order(log: list[Entry]) -> None:
    """What members are told follows from what was in the journal by then."""
    needed = {
        cohort.Boxes: (cohort.Boxes, len(NAMES)),
        cohort.Certificate: (cohort.Endorsement, cohort.quorum(len(NAMES))),
    }
    kinds = [(w, None if w in ("counted", "closed") else cohort.decode(m)) for w, _, m in log]
    for kind, (cause, count) in needed.items():
        first = next(i for i, (w, m) in enumerate(kinds) if w == "told" and isinstance(m, kind))
        heard = [m for w, m in kinds[:first] if w == "heard" and isinstance(m, cause)]
        assert len({m.slot for m in heard}) >= count


async def test_what_cannot_be_remembered_has_not_happened() -> None:
    desk = Desk()
    *first, last = desk.boxes().items()
    await desk.hear(first)
    desk.full = True
    with pytest.raises(StorageFault):
        await desk.masking.heard(*last)
    assert not desk.told(cohort.Boxes)
    assert not desk.masking.takes_uploads
    desk.full = False
    await desk.masking.heard(*last)
    assert desk.told(cohort.Boxes).keys() == set(NAMES)
    assert desk.masking.takes_uploads
    desk.masking.close()


async def test_a_step_that_is_computed_while_the_attempt_ends_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, gate, handle = Desk(), Gate(), cohort.handle_relay
    *first, last = desk.boxes().items()
    await desk.hear(first)
    before = list(desk.log)

    def held(*arguments: Any) -> Any:
        gate.wait()
        return handle(*arguments)

    monkeypatch.setattr(cohort, "handle_relay", held)
    hearing = [asyncio.create_task(desk.masking.heard(*message)) for message in (last, first[0])]
    await asyncio.to_thread(gate.entered.wait)
    desk.masking.close()
    gate.open.set()
    await asyncio.gather(*hearing)  # nobody waits for ever
    assert await desk.masking.settled(60.0) is None
    await desk.masking.heard(*last)  # of no more use, and no fault
    assert desk.log == before


async def test_a_member_hears_what_is_refused_and_the_next_step_is_followed() -> None:
    desk = Desk()
    boxes = desk.boxes()
    for wrong, reason in (
        (b"garbage", Reason.MALFORMED),
        (desk.masking.encoded_cohort, Reason.MALFORMED),
        (boxes["b"], Reason.COHORT_REFUSED),
        (cohort.Endorsement(ATTEMPT, 0, bytes(64)).encode(), Reason.WRONG_ROUND),
    ):
        with pytest.raises(Refused) as refused:
            await desk.masking.heard("a", wrong)
        assert refused.value.reason is reason
    await desk.collect()
    [(agent, message), *_] = desk.answers(cohort.Acceptance).items()
    forged = message[:-1] + bytes([message[-1] ^ 1])
    with pytest.raises(Refused) as refused:
        await desk.masking.heard(agent, forged)
    assert refused.value.reason is Reason.COHORT_REFUSED
    desk.masking.close()


async def test_who_comes_back_is_told_what_it_missed_in_its_turn() -> None:
    desk = Desk()
    boxes = desk.boxes()
    hearing = asyncio.gather(*(desk.masking.heard(*message) for message in boxes.items()))
    await asyncio.sleep(0)  # all of them wait for their turn
    desk.masking.repeat("b")
    await hearing
    await desk.masking.idle()
    told = [agent for what, agent, m in desk.log if what == "told"]
    assert told == [*NAMES, "b"]
    desk.masking.close()


async def test_a_fault_of_ours_ends_the_attempt_with_its_error() -> None:
    desk = Desk()
    await desk.hear(desk.boxes().items())
    desk.masking.counted(1, bytes(32))
    desk.masking.counted(1, bytes(32))
    with pytest.raises(IllegalStep):
        await desk.masking.settled(60.0)
    desk.masking.close()
