"""The roster: an invitation names as many keys as it has uses, and only members are let in."""

import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from coordinator.certificates import Issuer
from coordinator.roster import MAX_USES, Roster
from coordinator.roster_records import CertificateRequest
from coordinator.store import Store
from fedloom.errors import ConfigError, Reason, Refused
from tests.coordinator.holders import DER, Holder

SECRET, OTHER = bytes(32), bytes([9]) * 32
ROOT = Issuer.new_root(path_length=1)


@functools.cache
def holder(number: int) -> Holder:
    """Return the same device for the same number."""
    return Holder()


def chain_for(device: Holder, agent_id: str) -> tuple[bytes, ...]:
    return (ROOT.agent(device.key.public_key(), agent_id).public_bytes(DER),)


@pytest.fixture
def roster(any_store: Store) -> Roster:
    return any_store.roster


def redeem(
    roster: Roster, device: Holder, now: float = 5.0, secret: bytes = SECRET
) -> CertificateRequest | Reason:
    """Ask as a device does; return the reason of a refusal."""
    try:
        return roster.redeem(secret, device.digest, device.request_der, now)
    except Refused as refused:
        return refused.reason


def join(roster: Roster, device: Holder, now: float = 5.0, secret: bytes = SECRET) -> str | Reason:
    """Ask, and be given a certificate at once."""
    asked = redeem(roster, device, now, secret)
    if isinstance(asked, Reason):
        return asked
    if not asked.chain:
        chain = chain_for(device, asked.agent_id)
        assert roster.grant(asked.agent_id, device.digest, chain, now)
    return asked.agent_id


def admits(roster: Roster, agent_id: str, device: Holder) -> Reason | None:
    """Return why the agent is not let in with this key."""
    try:
        roster.require_member(agent_id, device.digest)
    except Refused as refused:
        return refused.reason
    return None


def test_an_invitation_makes_an_agent(roster: Roster) -> None:
    made = roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    assert (made.id, made.uses, made.used) == ("00000000", 1, 0)
    assert admits(roster, "kitchen-pi", holder(1)) is Reason.NOT_PERMITTED
    assert join(roster, holder(1)) == "kitchen-pi"
    assert admits(roster, "kitchen-pi", holder(1)) is None
    [agent] = roster.agents()
    assert agent == roster.agent("kitchen-pi")
    assert (agent.agent_id, agent.enrolled_at, agent.last_seen) == ("kitchen-pi", 5.0, None)
    certificate_ends = ROOT.agent(holder(1).key.public_key(), "x").not_valid_after_utc
    assert agent.certificate_until == pytest.approx(certificate_ends.timestamp(), abs=60)
    assert roster.invitations()[0].used == 1


def test_an_unknown_secret_is_refused(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    assert join(roster, holder(1), secret=OTHER) is Reason.INVALID_TOKEN
    assert roster.agents() == []


@pytest.mark.parametrize(("now", "found"), [(9.9, "kitchen-pi"), (10.0, Reason.TOKEN_EXPIRED)])
def test_an_invitation_ends_at_its_time(roster: Roster, now: float, found: object) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    assert join(roster, holder(1), now=now) == found


def test_a_key_that_was_named_may_ask_again_and_gets_the_same_answer(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    assert join(roster, holder(1)) == "kitchen-pi"
    first = redeem(roster, holder(1), now=6.0)
    assert isinstance(first, CertificateRequest)
    assert first.chain
    assert redeem(roster, holder(1), now=99.0) == first  # after the token's end too
    assert redeem(roster, holder(2), now=6.0) is Reason.INVALID_TOKEN
    assert roster.invitations()[0].used == 1


def test_several_uses_give_numbered_names(roster: Roster) -> None:
    roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=3)
    assert [join(roster, holder(n)) for n in (1, 2, 1, 3)] == [
        "sensor-1",
        "sensor-2",
        "sensor-1",
        "sensor-3",
    ]
    assert join(roster, holder(4)) is Reason.INVALID_TOKEN


def test_numbers_are_never_given_twice(roster: Roster) -> None:
    roster.add_invitation(bytes([1]) * 32, "sensor-7", expires_at=10.0)  # nobody has used it yet
    roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=2)
    roster.add_invitation(OTHER, "sensor", expires_at=10.0, uses=2)
    names = [
        join(roster, holder(n), secret=s) for n, s in enumerate((OTHER, SECRET, OTHER, SECRET))
    ]
    assert names == ["sensor-10", "sensor-8", "sensor-11", "sensor-9"]


def test_the_same_invitation_twice_is_one(roster: Roster) -> None:
    first = roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=2)
    assert roster.add_invitation(SECRET, "sensor", expires_at=11.0, uses=5) == first
    assert roster.invitations() == [first]


@pytest.mark.parametrize(
    ("name", "uses"),
    [("", 1), ("Kitchen", 1), ("a b", 1), ("-a", 1), ("a" * 65, 1), ("a" * 60, 2), ("a\n", 1)]
    + [("a", uses) for uses in (0, -1, MAX_USES + 1)],
)
def test_a_name_that_no_agent_may_have_is_a_config_error(
    roster: Roster, name: str, uses: int
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        roster.add_invitation(SECRET, name, 10.0, uses)
    assert roster.invitations() == []


def test_a_revoked_invitation_is_worthless_and_its_agents_stay(roster: Roster) -> None:
    made = roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=3)
    join(roster, holder(1))
    redeem(roster, holder(2))  # waits for a signature
    assert roster.revoke_invitation(made.id, at=7.0).revoked_at == 7.0
    assert roster.revoke_invitation(made.id, at=8.0).revoked_at == 7.0
    assert admits(roster, "sensor-1", holder(1)) is None
    assert isinstance(redeem(roster, holder(1)), CertificateRequest)
    assert redeem(roster, holder(2)) is Reason.INVALID_TOKEN
    assert redeem(roster, holder(3)) is Reason.INVALID_TOKEN
    assert roster.pending() == []
    with pytest.raises(Refused, match="NOT_FOUND"):
        roster.revoke_invitation("ffffffff", at=7.0)


def test_a_request_waits_until_it_is_granted(roster: Roster) -> None:
    roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=2)
    first, second = redeem(roster, holder(1), 1.0), redeem(roster, holder(2), 2.0)
    assert roster.pending() == [first, second]
    assert roster.agents() == []
    chain = chain_for(holder(1), "sensor-1")
    assert not roster.grant("sensor-1", holder(3).digest, chain, 9.0)  # nobody asked for that key
    assert not roster.grant("sensor-2", holder(1).digest, chain, 9.0)
    assert roster.grant("sensor-1", holder(1).digest, chain, 9.0)
    assert not roster.grant("sensor-1", holder(1).digest, chain, 9.0)
    assert roster.pending() == [second]
    answer = redeem(roster, holder(1), 99.0)
    assert isinstance(answer, CertificateRequest)
    assert answer.chain == chain
    assert admits(roster, "sensor-1", holder(1)) is None
    assert admits(roster, "sensor-2", holder(2)) is Reason.NOT_PERMITTED


def test_a_device_that_enrols_again_shuts_its_old_key_out(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    roster.add_invitation(OTHER, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    asked = redeem(roster, holder(2), secret=OTHER)
    assert admits(roster, "kitchen-pi", holder(1)) is None  # not before the new key is signed
    assert join(roster, holder(2), secret=OTHER) == "kitchen-pi"
    assert isinstance(asked, CertificateRequest)
    assert admits(roster, "kitchen-pi", holder(2)) is None
    assert admits(roster, "kitchen-pi", holder(1)) is Reason.NOT_PERMITTED
    redeem(roster, holder(1))  # a repeat with the old secret and key takes nothing back
    assert admits(roster, "kitchen-pi", holder(2)) is None
    assert len(roster.agents()) == 1


def renewal(roster: Roster, device: Holder, until: float) -> CertificateRequest:
    asked = CertificateRequest("kitchen-pi", device.digest, device.request_der, b"signature")
    return roster.renewal(asked, until, now=6.0)


def test_a_renewal_keeps_the_old_key_until_the_new_one_is_used(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    until = roster.agent("kitchen-pi").certificate_until - 86_400
    asked = renewal(roster, holder(2), until)
    assert roster.pending() == [asked]
    chain = chain_for(holder(2), "kitchen-pi")
    assert roster.grant("kitchen-pi", holder(2).digest, chain, 7.0)
    assert admits(roster, "kitchen-pi", holder(1)) is None
    assert renewal(roster, holder(2), until).chain == chain  # its answer was lost
    assert admits(roster, "kitchen-pi", holder(2)) is None
    assert admits(roster, "kitchen-pi", holder(1)) is Reason.NOT_PERMITTED
    assert roster.agent("kitchen-pi").enrolled_at == 5.0


def test_an_old_renewal_of_the_same_key_is_no_answer_to_a_new_one(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    renewal(roster, holder(1), until=0.0)
    roster.grant("kitchen-pi", holder(1).digest, chain_for(holder(1), "kitchen-pi"), 7.0)
    assert renewal(roster, holder(1), until=0.0).chain
    ends = roster.agent("kitchen-pi").certificate_until
    assert renewal(roster, holder(1), until=ends).chain == ()
    assert admits(roster, "kitchen-pi", holder(1)) is None


def test_a_later_renewal_takes_the_place_of_one_that_waits(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    renewal(roster, holder(2), until=0.0)
    last = renewal(roster, holder(3), until=0.0)
    assert roster.pending() == [last]


def test_a_ban_keeps_out_until_it_is_taken_back(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    roster.add_invitation(OTHER, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    renewal(roster, holder(3), until=0.0)
    assert roster.ban("kitchen-pi", "stolen", at=7.0).banned_at == 7.0
    banned = roster.ban("kitchen-pi", "found in a river", at=8.0)
    assert (banned.banned_at, banned.ban_reason) == (7.0, "found in a river")
    with pytest.raises(Refused) as refused:
        roster.require_member("kitchen-pi", holder(1).digest)
    assert (refused.value.reason, refused.value.subject) == (Reason.BANNED, "found in a river")
    assert redeem(roster, holder(1)) is Reason.BANNED
    assert redeem(roster, holder(2), secret=OTHER) is Reason.BANNED  # nor under the same name
    assert roster.pending() == []
    assert roster.unban("kitchen-pi").banned_at is None
    assert admits(roster, "kitchen-pi", holder(1)) is None
    assert join(roster, holder(2), secret=OTHER) == "kitchen-pi"


def test_nobody_unknown_is_banned_or_told_of(roster: Roster) -> None:
    for ask in (
        lambda: roster.ban("nobody", "x", 1.0),
        lambda: roster.unban("nobody"),
        lambda: roster.agent("nobody"),
    ):
        with pytest.raises(Refused) as refused:
            ask()
        assert refused.value.reason is Reason.NOT_FOUND
    roster.seen("nobody", 1.0)
    assert roster.agents() == []


def test_it_is_remembered_when_an_agent_was_seen(roster: Roster) -> None:
    roster.add_invitation(SECRET, "kitchen-pi", expires_at=10.0)
    join(roster, holder(1))
    roster.seen("kitchen-pi", 8.5)
    assert roster.agent("kitchen-pi").last_seen == 8.5


def test_the_roster_is_there_after_a_restart(place: Path | str, roster: Roster) -> None:
    roster.add_invitation(SECRET, "sensor", expires_at=10.0, uses=3)
    join(roster, holder(1))
    redeem(roster, holder(2))
    roster.ban("sensor-1", "stolen", 7.0)
    before = (roster.invitations(), roster.agents(), roster.pending())
    other = Store(place)
    assert (other.roster.invitations(), other.roster.agents(), other.roster.pending()) == before
    assert redeem(other.roster, holder(2)) == before[2][0]
    other.close()


def test_of_many_keys_at_once_as_many_are_named_as_there_are_uses(roster: Roster) -> None:
    for attempt in range(5):
        secret = bytes([attempt]) * 32
        roster.add_invitation(secret, f"fleet-{attempt}", expires_at=10.0, uses=3)
        devices = [holder(number) for number in range(8)]
        asked = devices + devices[:4]  # some ask twice at once
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda d, s=secret: redeem(roster, d, 5.0, s), asked))
        names = {
            device.digest: answer.agent_id
            for device, answer in zip(asked, answers, strict=True)
            if isinstance(answer, CertificateRequest)
        }
        assert sorted(names.values()) == [f"fleet-{attempt}-{n}" for n in (1, 2, 3)]
        refused = [answer for answer in answers if isinstance(answer, Reason)]
        assert set(refused) == {Reason.INVALID_TOKEN}


@dataclass
class Expected:
    """What the roster should say of one name, by a simpler book-keeping."""

    key: int | None = None
    next_key: int | None = None
    banned: bool = False
    waiting: set[int] = field(default_factory=set)  # keys that an invitation named


class RosterMachine(RuleBasedStateMachine):
    """Any order of requests, grants, renewals, bans and revocations, against an oracle."""

    secrets = Bundle("secrets")
    requests = Bundle("requests")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "store.sqlite")
        self.roster = self.store.roster
        self.uses: dict[bytes, int] = {}
        self.named: dict[tuple[bytes, int], str] = {}
        self.revoked: set[bytes] = set()
        self.signed: set[tuple[bytes, int]] = set()
        self.agents: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(target=secrets, number=st.integers(0, 9), uses=st.integers(1, 3))
    def invite(self, number: int, uses: int) -> bytes:
        secret = bytes([number]) * 32
        self.roster.add_invitation(secret, f"device{number % 3}", 100.0, uses)
        self.uses.setdefault(secret, uses)
        return secret

    @rule(target=requests, secret=secrets, number=st.integers(0, 4), late=st.booleans())
    def ask(self, secret: bytes, number: int, late: bool) -> tuple[bytes, int]:
        used = sum(1 for other, _ in self.named if other == secret)
        answer = redeem(self.roster, holder(number), 200.0 if late else 5.0, secret)
        known = self.named.get((secret, number))
        if secret in self.revoked and (secret, number) not in self.signed:
            assert answer is Reason.INVALID_TOKEN
        elif known is not None:
            self._answered(answer, known)
        elif used >= self.uses[secret]:
            assert answer is Reason.INVALID_TOKEN
        elif late:
            assert answer is Reason.TOKEN_EXPIRED
        elif isinstance(answer, Reason):
            assert answer is Reason.BANNED
        else:
            numbered = self.uses[secret] > 1
            taken = [name for (other, _), name in self.named.items() if numbered or other == secret]
            assert answer.agent_id not in taken
            assert numbered == ("-" in answer.agent_id)
            self.named[secret, number] = answer.agent_id
            self.agents.setdefault(answer.agent_id, Expected())
        return secret, number

    def _answered(self, answer: object, name: str) -> None:
        if self.agents[name].banned:
            assert answer is Reason.BANNED
        else:
            assert isinstance(answer, CertificateRequest)
            assert answer.agent_id == name

    @rule(request=requests)
    def sign(self, request: tuple[bytes, int]) -> None:
        number = request[1]
        name = self.named.get(request)
        if name is None:
            return
        asked = {r for r, n in self.named.items() if n == name and r[1] == number} - self.signed
        asked = {r for r in asked if r[0] not in self.revoked}
        chain = chain_for(holder(number), name)
        granted = self.roster.grant(name, holder(number).digest, chain, 6.0)
        assert (granted is not None) == bool(asked)
        if granted:
            self.signed |= asked
            self.agents[name].key, self.agents[name].next_key = number, None

    @rule(name=st.sampled_from(["device0", "device1-1"]), number=st.integers(0, 4))
    def renew(self, name: str, number: int) -> None:
        expected = self.agents.get(name)
        if expected is None or expected.key is None:
            return
        unsigned = any(
            n == name and r[1] == number and r not in self.signed and r[0] not in self.revoked
            for r, n in self.named.items()
        )
        if unsigned:
            return  # the same key also waits to be enrolled: `sign` looks at that
        device = holder(number)
        asked = CertificateRequest(name, device.digest, device.request_der)
        assert self.roster.renewal(asked, until=4e9, now=6.0) == asked
        assert self.roster.grant(name, device.digest, chain_for(device, name), 7.0)
        if number != expected.key:
            expected.next_key = number

    @rule(name=st.sampled_from(["device0", "device1-1"]), banned=st.booleans())
    def ban(self, name: str, banned: bool) -> None:
        expected = self.agents.get(name)
        if expected is None or expected.key is None:
            return
        expected.banned = banned
        record = self.roster.ban(name, "x", 1.0) if banned else self.roster.unban(name)
        assert (record.banned_at is not None) == banned

    @rule(secret=consumes(secrets))
    def revoke(self, secret: bytes) -> None:
        self.roster.revoke_invitation(secret.hex()[:8], 1.0)
        self.revoked.add(secret)

    @rule(name=st.sampled_from(["device0", "device1-1"]), number=st.integers(0, 4))
    def call(self, name: str, number: int) -> None:
        expected = self.agents.get(name, Expected())
        found = admits(self.roster, name, holder(number))
        if expected.banned:
            assert found is Reason.BANNED
        elif number in (expected.key, expected.next_key) and expected.key is not None:
            assert found is None
            if number == expected.next_key:
                expected.key, expected.next_key = number, None
        else:
            assert found is Reason.NOT_PERMITTED

    @invariant()
    def uses_are_counted(self) -> None:
        used = {invitation.id: invitation.used for invitation in self.roster.invitations()}
        for secret in self.uses:
            assert used[secret.hex()[:8]] == sum(1 for other, _ in self.named if other == secret)
        enrolled = [name for name, expected in self.agents.items() if expected.key is not None]
        assert sorted(enrolled) == [agent.agent_id for agent in self.roster.agents()]


RosterMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestRosterInAnyOrder = RosterMachine.TestCase
