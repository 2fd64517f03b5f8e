"""Orderings: chaos under an honest coordinator, and anything under a lying one."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crypto import ProtocolFault
from crypto.cohort import (
    Acceptance,
    Boxes,
    Certificate,
    CloseReleases,
    CloseSharing,
    CloseUploads,
    CloseVouching,
    Cohort,
    Endorsement,
    Join,
    MemberPhase,
    RelayPhase,
    Release,
    Uploaded,
    handle_member,
    quorum,
    repeat,
    threshold,
    tolerated,
)
from crypto.cohort.secrets import AttemptSecret
from crypto.errors import StaleAttempt, StepRefused

from .cohorts import Device, Federation, attempt_of, secret_of, sign_as

DEADLINES = {
    RelayPhase.SHARING: CloseSharing,
    RelayPhase.COLLECTING: CloseUploads,
    RelayPhase.VOUCHING: CloseVouching,
    RelayPhase.RELEASING: CloseReleases,
}


class HonestCoordinator(RuleBasedStateMachine):
    """Messages are lost, repeated and reordered, devices die, both sides restart from disk."""

    @initialize(count=st.integers(3, 7))
    def start(self, count):
        self.federation = Federation(count)
        self.dead = set()
        self.released = defaultdict(set)  # (agent, round) → releases seen
        self.federation.join()
        self.log = list(self.federation.queue)

    @property
    def relay(self):
        return self.federation.relay

    def deliver(self, effect):
        device = self.federation.devices[effect.agent_id]
        if effect.agent_id in self.dead:
            return
        try:
            answer = device.take(effect.message)
        except (StaleAttempt, StepRefused):
            return  # too early, or of an attempt that is over
        self.told(device, answer)
        if device.state.phase is MemberPhase.MASKED:
            self.uploaded(device)

    def told(self, device, answer):
        if isinstance(answer, Release):
            self.released[device.agent_id, answer.attempt.round].add(answer.encode())
        if answer is not None:
            try:
                self.federation.tell(answer)
            except (StaleAttempt, StepRefused):
                return

    def uploaded(self, device):
        device.encode()
        if self.relay.phase is RelayPhase.COLLECTING and self.relay.attempt == device.state.attempt:
            slot, sha256 = device.state.slot, device.state.upload
            self.federation.tell(Uploaded(self.relay.attempt, slot, sha256))

    @precondition(lambda self: self.federation.queue)
    @rule(data=st.data())
    def message_arrives(self, data):
        place = data.draw(st.integers(0, len(self.federation.queue) - 1))
        self.federation.queue.rotate(-place)
        effect = self.federation.queue.popleft()
        self.log.append(effect)
        self.deliver(effect)

    @precondition(lambda self: len(self.federation.queue) > 3)
    @rule()
    def a_few_messages_arrive_in_order(self):
        for _ in range(min(4, len(self.federation.queue))):
            effect = self.federation.queue.popleft()
            self.log.append(effect)
            self.deliver(effect)

    @rule(data=st.data())
    def an_old_message_arrives_again(self, data):
        self.deliver(data.draw(st.sampled_from(self.log)))

    @precondition(lambda self: self.federation.queue)
    @rule()
    def message_is_lost(self):
        self.federation.queue.popleft()

    @rule(data=st.data())
    def device_restarts(self, data):
        name = data.draw(st.sampled_from(sorted(self.federation.devices)))
        self.federation.devices[name].restart()
        if name not in self.dead:
            self.federation.queue.extend(repeat(self.relay, name))

    @rule(data=st.data())
    def device_dies(self, data):
        self.dead.add(data.draw(st.sampled_from(sorted(self.federation.devices))))

    @rule()
    def coordinator_restarts(self):
        again = self.federation.replayed()
        assert again == self.relay
        self.federation.relay = again
        for name in self.federation.devices:
            self.federation.queue.extend(repeat(again, name))

    @precondition(lambda self: self.relay.phase in DEADLINES)
    @rule()
    def deadline_passes(self):
        self.federation.tell(DEADLINES[self.relay.phase](self.relay.attempt))

    @precondition(lambda self: self.relay.phase is RelayPhase.ABANDONED)
    @rule()
    def survivors_form_again(self):
        self.again()

    def again(self):
        survivors = set(self.federation.survivors or self.federation.devices) - self.dead
        attempt = self.relay.attempt
        following = replace(attempt, attempt=attempt.attempt + 1)
        if len(survivors) < 3 or not self.federation.survivors:
            following = attempt_of(attempt.round + 1)  # the round is lost, the run is not
            survivors = set(self.federation.devices) - self.dead
        if len(survivors) < 3:
            return False
        self.federation.open(following)
        self.federation.join(*sorted(survivors))
        return True

    @invariant()
    def nobody_releases_twice_in_a_round(self):
        assert all(len(releases) == 1 for releases in self.released.values())

    @invariant()
    def what_is_opened_is_the_sum_of_the_accepted(self):
        if self.relay.phase is RelayPhase.CORRECTED and self.federation.correction is not None:
            self.federation.check_sum()
            n = len(self.relay.cohort.members)
            assert len(self.relay.acceptance.slots) >= max(3, quorum(n))

    def teardown(self):
        """Liveness: once nobody dies or loses messages any more, a sum opens."""
        if not hasattr(self, "federation"):
            return
        for _ in range(4):
            self.settle()
            if self.relay.phase is RelayPhase.CORRECTED:
                return
            if self.relay.phase is RelayPhase.ABANDONED and not self.again():
                return  # fewer than three devices are left
        raise AssertionError(f"expected a sum, found {self.relay.phase.name}")

    def settle(self):
        for _ in range(len(RelayPhase)):
            for name in sorted(set(self.federation.devices) - self.dead):
                self.federation.queue.extend(repeat(self.relay, name))
            while self.federation.queue:
                self.deliver(self.federation.queue.popleft())
            if self.relay.phase in DEADLINES:
                self.federation.tell(DEADLINES[self.relay.phase](self.relay.attempt))


class LyingCoordinator(RuleBasedStateMachine):
    """It knows everything that its colluders know, signs what they sign, and says anything.

    Knowledge is kept as what it can compute: for each cohort and honest member, from how many
    holders it has a share of the seed, and of the mask key.
    """

    honest = ("h0", "h1", "h2", "h3", "h4")
    corrupt = ("c0", "c1")

    @initialize()
    def start(self):
        self.devices = {name: Device(name) for name in self.honest}
        self.advertised = defaultdict(dict)  # attempt → agent → advertisement
        self.cohorts = {}  # digest → cohort
        self.dealt = defaultdict(dict)  # digest → slot → Boxes
        self.lists = {}  # digest of acceptance → acceptance
        self.vouched = defaultdict(dict)  # digest of acceptance → slot → signature
        self.knows = defaultdict(set)  # (cohort digest, owner slot, kind) → holder slots
        self.released = defaultdict(set)  # (agent, round) → encoded releases
        self.said = []  # (agent, message): to be said again

    def say(self, name, message):
        self.said.append((name, message))
        device = self.devices[name]
        before = device.state
        try:
            answer = device.take(message)
        except ProtocolFault:
            assert device.state is before
            return
        self.learn(device, answer)

    def learn(self, device, answer):
        match answer:
            case Boxes():
                digest = device.state.cohort.digest
                self.dealt[digest].setdefault(answer.slot, answer)
                assert self.dealt[digest][answer.slot] == answer
            case Endorsement():
                acceptance = device.state.acceptance
                self.vouched[acceptance.digest][answer.slot] = answer.signature
            case Release():
                self.learn_release(device, answer)

    def learn_release(self, device, release):
        self.released[device.agent_id, release.attempt.round].add(release.encode())
        cohort, accepted = device.state.cohort, device.state.acceptance.slots
        self.knows[cohort.digest, release.slot, "seed"].add(release.slot)  # the seed itself
        for other in range(len(cohort.members)):
            if other != release.slot:
                kind = "seed" if other in accepted else "mask key"
                self.knows[cohort.digest, other, kind].add(release.slot)

    @rule(round_number=st.integers(1, 2), attempt=st.integers(1, 3), data=st.data())
    def ask_to_join(self, round_number, attempt, data):
        names = data.draw(st.sets(st.sampled_from(self.honest), min_size=1))
        self.gather(attempt_of(round_number, attempt), names)

    def gather(self, attempt, names):
        for name in sorted(names):
            try:
                self.advertised[attempt][name] = self.devices[name].join(attempt)
            except StaleAttempt:
                continue
        for name in self.corrupt:  # colluders advertise to every attempt
            self.advertised[attempt][name] = _advertisement_of(name, attempt)

    @precondition(lambda self: any(len(a) > 2 for a in self.advertised.values()))
    @rule(data=st.data())
    def show_a_cohort(self, data):
        """Any members, to any of them: cohorts of one attempt may differ from device to device."""
        attempts = sorted(a for a, found in self.advertised.items() if len(found) > 2)
        attempt = data.draw(st.sampled_from(attempts))
        available = sorted(self.advertised[attempt])
        names = data.draw(st.sets(st.sampled_from(available), min_size=3))
        audience = data.draw(st.sets(st.sampled_from(self.honest)))
        self.form(attempt, names, audience)

    def form(self, attempt, names, audience):
        if len(names & set(self.corrupt)) > tolerated(len(names)):
            return None  # more colluders than the claim allows
        members = tuple(self.advertised[attempt][name] for name in sorted(names))
        cohort = Cohort(attempt, 3, members)
        self.cohorts[cohort.digest] = cohort
        for name in sorted(names & set(audience)):
            self.say(name, cohort)
        return cohort

    @precondition(lambda self: self.dealt)
    @rule(data=st.data())
    def relay_boxes(self, data):
        cohort = self.cohorts[data.draw(st.sampled_from(sorted(self.dealt)))]
        self.pass_boxes_on(cohort, data.draw(st.sets(st.sampled_from(self.honest), min_size=3)))

    def pass_boxes_on(self, cohort, audience):
        dealt, members = self.dealt[cohort.digest], cohort.members
        for slot, member in enumerate(members):
            if member.agent_id in self.corrupt:
                secret = AttemptSecret(secret_of(member.agent_id, cohort.attempt), cohort.attempt)
                dealt.setdefault(slot, Boxes(cohort.attempt, slot, secret.boxes(cohort, slot)))
        if len(dealt) < len(members):
            return  # nobody can make the boxes of an honest device
        for slot, member in enumerate(members):
            if member.agent_id in audience:
                others = (sender for sender in range(len(members)) if sender != slot)
                gathered = tuple(dealt[o].boxes[slot - (slot > o)] for o in others)
                self.say(member.agent_id, Boxes(cohort.attempt, slot, gathered))
                device = self.devices[member.agent_id]
                if device.state.phase is MemberPhase.MASKED:
                    device.encode()

    @precondition(lambda self: any(d.state.upload for d in self.devices.values()))
    @rule(data=st.data())
    def show_an_accepted_list(self, data):
        """Any list, to anyone: drop-outs may be invented, and lists may differ."""
        digests = {d.state.cohort.digest for d in self.devices.values() if d.state.upload}
        cohort = self.cohorts[data.draw(st.sampled_from(sorted(digests)))]
        dropped = data.draw(st.sets(st.integers(0, len(cohort.members) - 1), max_size=2))
        self.accept(cohort, dropped, data.draw(st.sets(st.sampled_from(self.honest))))

    def accept(self, cohort, dropped, audience):
        rows = []
        for slot, member in enumerate(cohort.members):
            if slot not in dropped:
                device = self.devices.get(member.agent_id)
                ours = device and device.state.upload and device.state.attempt == cohort.attempt
                rows.append((slot, device.state.upload if ours else bytes(32)))
        acceptance = Acceptance(cohort.attempt, cohort.digest, tuple(rows))
        self.lists[acceptance.digest] = acceptance
        for slot in acceptance.slots:
            if cohort.members[slot].agent_id in audience:
                self.say(cohort.members[slot].agent_id, acceptance)
        return acceptance

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), forged=st.sets(st.integers(0, 6), max_size=1))
    def show_a_certificate(self, data, forged):
        acceptance = self.lists[data.draw(st.sampled_from(sorted(self.lists)))]
        self.certify(acceptance, forged, data.draw(st.sets(st.sampled_from(self.honest))))

    def certify(self, acceptance, forged, audience):
        cohort = self.cohorts[acceptance.cohort]
        signatures = dict(self.vouched[acceptance.digest])
        for slot in acceptance.slots:
            name = cohort.members[slot].agent_id
            if name in self.corrupt:
                signatures[slot] = sign_as(name)(acceptance.statement())
            elif slot not in signatures and slot in forged:
                signatures[slot] = bytes(64)
        rows = tuple(sorted(signatures.items()))
        certificate = Certificate(acceptance.attempt, acceptance.digest, rows)
        for slot in acceptance.slots:
            if cohort.members[slot].agent_id in audience:
                self.say(cohort.members[slot].agent_id, certificate)

    @rule(data=st.data(), round_number=st.integers(1, 2), attempt=st.integers(1, 4))
    def lie_in_one_step_of_an_attempt(self, data, round_number, attempt):
        """Everything as it should be but for what is drawn: so that there are releases to abuse."""
        identifier = attempt_of(round_number, attempt)
        everyone = set(self.honest)
        self.gather(identifier, data.draw(st.sets(st.sampled_from(self.honest), min_size=3)))
        colluders = data.draw(st.integers(0, 2))
        names = set(self.advertised[identifier]) - set(self.corrupt[colluders:])
        if len(names) < 3 or (cohort := self.form(identifier, names, everyone)) is None:
            return
        self.pass_boxes_on(cohort, everyone)
        last = len(cohort.members) - 1
        for _ in range(data.draw(st.integers(1, 2))):  # twice: another list for some of them
            dropped = data.draw(st.sets(st.integers(0, last), max_size=2))
            audience = data.draw(
                st.one_of(st.just(everyone), st.sets(st.sampled_from(self.honest)))
            )
            acceptance = self.accept(cohort, dropped, audience)
            self.certify(acceptance, set(), data.draw(st.sampled_from([everyone, audience])))

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def say_it_again_to_anyone(self, data):
        _, message = data.draw(st.sampled_from(self.said))
        self.say(data.draw(st.sampled_from(self.honest)), message)

    @rule(name=st.sampled_from(honest))
    def device_restarts(self, name):
        self.devices[name].restart()

    @invariant()
    def nobody_releases_twice_in_a_round(self):
        assert all(len(releases) == 1 for releases in self.released.values())

    @invariant()
    def never_both_secrets_of_a_member(self):
        for cohort in self.cohorts.values():
            for slot in self.honest_slots(cohort):
                assert not (self.has(cohort, slot, "seed") and self.has(cohort, slot, "mask key"))

    @invariant()
    def every_opened_sum_has_enough_honest_members(self):
        for cohort in self.cohorts.values():
            honest = self.honest_slots(cohort)
            seeds = {slot for slot in honest if self.has(cohort, slot, "seed")}
            stripped = {slot for slot in honest if self.has(cohort, slot, "mask key")}
            if seeds and seeds | stripped == set(honest):  # every mask in the sum is known
                n, c = len(cohort.members), len(cohort.members) - len(honest)
                assert len(seeds) >= max(2, quorum(n) - c)

    @invariant()
    def no_combination_of_a_rounds_sums_shows_one_update(self):
        for number in {a.round for a in self.advertised}:
            sums = np.array(list(self.opened_sums(number))).reshape(-1, len(self.honest))
            rank = np.linalg.matrix_rank(sums) if len(sums) else 0
            for one in np.eye(len(self.honest)):
                assert np.linalg.matrix_rank(np.vstack([sums, one])) == rank + 1

    def opened_sums(self, number):
        """Yield, for each sum that the coordinator can open, which honest updates are in it."""
        for cohort in self.cohorts.values():
            honest = self.honest_slots(cohort)
            seeds = {slot for slot in honest if self.has(cohort, slot, "seed")}
            stripped = {slot for slot in honest if self.has(cohort, slot, "mask key")}
            if cohort.attempt.round == number and seeds and seeds | stripped == set(honest):
                names = {cohort.members[slot].agent_id for slot in seeds}
                yield [float(name in names) for name in self.honest]

    def honest_slots(self, cohort):
        return [i for i, m in enumerate(cohort.members) if m.agent_id in self.honest]

    def has(self, cohort, slot, kind):
        """Whether the coordinator and its colluders can compute this secret."""
        told = self.knows[cohort.digest, slot, kind]
        if slot in told:
            return True
        colluders = set(range(len(cohort.members))) - set(self.honest_slots(cohort))
        return len(told | colluders) >= threshold(len(cohort.members))


def _advertisement_of(name, attempt):
    """A colluder is a device like the others, but for whom it tells."""
    colluder = Device(name)
    _, answer = handle_member(
        colluder.state, Join(attempt, secret_of(name, attempt)), colluder.tools
    )
    return answer


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestHonestCoordinator = HonestCoordinator.TestCase
TestHonestCoordinator.settings = _SETTINGS
TestLyingCoordinator = LyingCoordinator.TestCase
TestLyingCoordinator.settings = _SETTINGS


def test_the_lying_coordinator_does_obtain_releases_and_cannot_abuse_them():
    """The rules above reach what they are about: one honest play opens, a second list does not."""
    machine = LyingCoordinator()
    machine.start()
    everyone, attempt = set(machine.honest), attempt_of()
    machine.gather(attempt, everyone)
    cohort = machine.form(attempt, everyone | set(machine.corrupt), everyone)
    machine.pass_boxes_on(cohort, everyone)
    split = machine.accept(cohort, {2}, everyone - {"h0"})
    machine.certify(split, set(), everyone)
    honest = machine.honest_slots(cohort)
    assert [machine.has(cohort, slot, "seed") for slot in honest].count(True) == 4
    assert machine.has(cohort, 2, "mask key")
    other = machine.accept(cohort, set(), everyone)
    machine.certify(other, set(), everyone)
    assert not machine.has(cohort, 2, "seed")
    machine.gather(attempt_of(attempt=2), everyone)
    assert not machine.advertised[attempt_of(attempt=2)].keys() & {"h1", "h2", "h3", "h4"}
    machine.every_opened_sum_has_enough_honest_members()
    machine.never_both_secrets_of_a_member()


def test_a_second_sum_without_one_voucher_cannot_be_formed():
    """The difference of two sums of a round: n = 5, c = 2, see the README."""
    machine = LyingCoordinator()
    machine.start()
    first, second = attempt_of(), attempt_of(attempt=2)
    machine.gather(first, {"h0", "h1", "h2"})
    cohort = machine.form(first, {"h0", "h1", "h2", "c0", "c1"}, set(machine.honest))
    machine.pass_boxes_on(cohort, set(machine.honest))
    acceptance = machine.accept(cohort, set(), set(machine.honest))
    machine.certify(acceptance, set(), {"h0"})
    assert machine.has(cohort, 4, "seed")  # opened: h0 + h1 + h2
    machine.gather(second, {"h1", "h2", "h3"})
    assert machine.advertised[second].keys() & set(machine.honest) == {"h3"}
    machine.no_combination_of_a_rounds_sums_shows_one_update()
