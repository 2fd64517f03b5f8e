"""A sum for each group of a cohort: masks inside it, a quorum of it, its members and no other's."""

import hashlib
import io

import numpy as np
import pytest

from crypto import Correction, EmptyTotal, MalformedChunk, Mask, OpenedSum, PeerFault
from crypto.cohort import (
    Certificate,
    CloseReleases,
    CloseUploads,
    MemberPolicy,
    MemberTools,
    decode,
    handle_member,
)
from crypto.cohort.quorum import enough, neighbours, quorum
from crypto.cohort.relay import new_attempt
from crypto.cohort.relay_state import RelayPhase
from crypto.errors import AcceptanceRefused, CertificateRefused, CohortRefused
from crypto.groups import GroupedTotal, draw, open_sums
from tests.crypto.cohorts import Federation, opened, plain_sum, repeat, sign_as, verify
from tests.crypto.conftest import Bench, own_mask

GROUPS = 3


class GroupedFederation(Federation):
    """As its parent; devices and relay have agreed on groups."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        for name, device in self.devices.items():
            device.tools = MemberTools(sign_as(name), verify, MemberPolicy(3, GROUPS))

    def join(self, groups: int = GROUPS) -> None:
        advertised = [device.join(self.attempt) for device in self.devices.values()]
        self.relay = new_attempt(self.attempt, self.minimum, advertised, groups)
        for member in self.relay.cohort.members:
            self.queue.extend(repeat(self.relay, member.agent_id))

    def group(self, number: int) -> list[str]:
        """Return the names of a group's members."""
        cohort = self.relay.cohort
        pairs = zip(cohort.members, cohort.group_of, strict=True)
        return [member.agent_id for member, group in pairs if group == number]

    def check_sums(self) -> None:
        """Each group's uploads and the masks left in them give its sum, and no other's."""
        accepted = {device.agent_id: device for device in self.accepted()}
        for number in range(GROUPS):
            devices = [accepted[name] for name in self.group(number) if name in accepted]
            total = opened([d.upload for d in devices], self.correction.of(number))
            np.testing.assert_array_equal(total, plain_sum(devices))

    def without_upload(self, *quiet: str) -> None:
        """Run to the end; these vanish before they upload."""

        def upload(device) -> None:
            if device.agent_id not in quiet:
                Federation.upload(self, device)

        self.upload = upload
        self.run()
        self.gone.update(quiet)
        self.tell(CloseUploads(self.relay.attempt))
        self.run()


@pytest.mark.parametrize("count", [9, 10, 14])
def test_each_group_has_its_sum(count: int) -> None:
    federation = GroupedFederation(count)
    federation.join()
    federation.run()
    assert federation.relay.phase is RelayPhase.CORRECTED
    federation.check_sums()


def test_masks_do_not_leave_their_group() -> None:
    """One group's sum does not open with another group's members in it, or without one of them."""
    federation = GroupedFederation(12)
    federation.join()
    federation.run()
    first, second = (federation.group(number) for number in (0, 1))
    swapped = [federation.devices[name] for name in (*first[1:], second[0])]
    total = opened([d.upload for d in swapped], federation.correction.of(0))
    assert (total != plain_sum(swapped)).all()


def test_who_vanishes_from_a_group_of_four_leaves_its_masks_to_the_others() -> None:
    federation = GroupedFederation(12)
    federation.join()
    gone = federation.group(1)[2]
    federation.without_upload(gone)
    federation.tell(CloseReleases(federation.relay.attempt))
    assert len(federation.accepted()) == 11
    federation.check_sums()


def test_a_group_of_two_is_never_opened() -> None:
    """A third of the cohort may vanish, and none of a group of three."""
    federation = GroupedFederation(9)
    federation.join()
    federation.without_upload(federation.group(2)[0])
    assert federation.relay.phase is RelayPhase.ABANDONED
    assert len(federation.survivors) == 8


def test_a_coordinator_that_wants_a_smaller_group_is_refused_by_each_device() -> None:
    federation = GroupedFederation(9)
    federation.join()
    federation.run()
    cohort, relay = federation.relay.cohort, federation.relay
    asked = federation.devices[federation.group(0)[0]]
    left_out = cohort.slot(federation.group(2)[0])
    before = type(asked.state).decode(asked.state.encode())
    uploads = tuple(pair for pair in relay.acceptance.uploads if pair[0] != left_out)
    lied = type(relay.acceptance)(relay.attempt, cohort.digest, uploads)
    uploading = type(before)(
        before.agent_id,
        before.attempt,
        type(before.phase).UPLOADING,
        b"s" * 32,
        cohort,
        before.received,
        before.upload,
    )
    with pytest.raises(AcceptanceRefused, match="quorum of each group"):
        handle_member(uploading, lied, asked.tools)


def test_a_certificate_needs_a_quorum_of_each_group() -> None:
    """Else some of a group could be in another sum of the round, and the difference show one."""
    federation = GroupedFederation(9)
    federation.join()
    while federation.relay.phase < RelayPhase.RELEASING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    cohort, certificate = federation.relay.cohort, federation.relay.certificate
    assert len(certificate.endorsements) == 9  # all of each group of three
    slots = [cohort.slot(name) for name in federation.group(1)]
    fewer = tuple(pair for pair in certificate.endorsements if pair[0] not in slots[:2])
    assert len(fewer) == quorum(9)  # enough for one sum of nine
    asked = federation.devices[federation.group(0)[0]]
    with pytest.raises(CertificateRefused, match="quorum of each group"):
        asked.take(Certificate(certificate.attempt, certificate.acceptance, fewer))


@pytest.mark.parametrize(("count", "groups"), [(9, 1), (9, 2), (8, GROUPS), (9, 4)])
def test_other_groups_than_agreed_or_too_small_ones_are_refused(count: int, groups: int) -> None:
    federation = GroupedFederation(count)
    federation.join(groups)
    with pytest.raises(CohortRefused, match="group"):
        federation.run()


def test_groups_are_in_the_digest_and_survive_the_wire() -> None:
    federation = GroupedFederation(9)
    federation.join()
    cohort = federation.relay.cohort
    assert decode(cohort.encode()) == cohort
    one = type(cohort)(cohort.attempt, cohort.minimum, cohort.members)
    assert one.digest != cohort.digest
    assert decode(one.encode()) == one
    assert one.encode()[28:] == cohort.encode()[30:]


def test_a_large_group_has_a_ring_of_its_own() -> None:
    group_of = draw(bytes(32), 210, 3)
    near = [set(neighbours(bytes(32), 210, slot, group_of)) for slot in range(210)]
    for slot, others in enumerate(near):
        assert len(others) == 64
        assert all(slot in near[other] for other in others)
        assert {group_of[other] for other in others} == {group_of[slot]}
    assert enough(group_of, range(210), lambda size: size)
    assert not enough(group_of, range(209), lambda size: size)


# totals, in every protection


def middle(means: list[np.ndarray]) -> np.ndarray:
    return np.median(means, axis=0).astype(np.float32)


class Round:
    """Nine members in three groups of one protection, from updates to what is opened."""

    def __init__(self, bench: Bench, updates: list[np.ndarray], tail: int = 0) -> None:
        self.bench = bench
        size = len(updates[0])
        self.context = bench.context(capacity=9, parameter_count=size, tail_length=tail)
        self.group_of = draw(bytes(32), 9, GROUPS)
        self.total = GroupedTotal(self.group_of, lambda: bench.protection.accumulator(self.context))
        for member, update in enumerate(updates):
            encoded = bench.upload(self.context, member, update, 1 + member, member)
            assert len(encoded) == self.total.encoded_update_size
            self.total.add(member, io.BytesIO(encoded))

    def encoded(self) -> bytes:
        masks = tuple(own_mask(member) for member in self.total.members)
        groups = tuple(self.group_of[member] for member in self.total.members)
        correction = Correction(masks, groups) if self.bench.masked else None
        encoded = b"".join(self.total.result(correction))
        assert len(encoded) == self.total.encoded_sum_size
        return encoded

    def open(self, encoded: bytes, tail: int = 0) -> OpenedSum:
        def open_one(members, source) -> OpenedSum:
            return self.bench.protection.open_sum(self.context, self.bench.run_key, members, source)

        return open_sums(self.total.members, GROUPS, io.BytesIO(encoded), open_one, middle, tail)


def updates_of(random_update, tail: float = 0.25) -> list[np.ndarray]:
    updates = [random_update(seed=seed) for seed in range(9)]
    for update in updates:
        update[-1:] = tail
    return updates


def test_the_opened_mean_is_the_rule_over_the_groups(bench: Bench, random_update) -> None:
    updates = updates_of(random_update)
    made = Round(bench, updates, tail=1)
    opened_sum = made.open(made.encoded(), tail=1)
    exact, weights = np.array(updates, np.float64), np.arange(1.0, 10)
    group_of = np.array(made.group_of)
    means = []
    for group in range(GROUPS):
        own = group_of == group
        means.append(weights[own] @ exact[own].clip(-0.5, 0.5) / weights[own].sum())
    expected = np.median(means, axis=0)
    np.testing.assert_allclose(opened_sum.mean[:-1], expected[:-1], rtol=0, atol=2e-5)
    assert opened_sum.mean[-1] == pytest.approx(0.25, abs=1e-5)
    assert (opened_sum.count, opened_sum.total_weight) == (9, 45)


def test_whatever_a_member_sends_changes_its_group_alone(bench: Bench, random_update) -> None:
    """Also in what follows from the histogram: two groups of three agree on the next clip."""
    updates = updates_of(random_update)
    honest = Round(bench, updates)
    before = honest.open(honest.encoded())
    updates[4][:] = 0.5
    hostile = Round(bench, updates)
    after = hostile.open(hostile.encoded())
    others = [g for g in range(GROUPS) if g != honest.group_of[4]]
    exact, weights, group_of = np.array(updates), np.arange(1.0, 10), np.array(honest.group_of)
    low, high = np.sort(
        [
            weights[group_of == g] @ exact[group_of == g] / weights[group_of == g].sum()
            for g in others
        ],
        axis=0,
    )
    assert (after.mean >= low - 2e-5).all()
    assert (after.mean <= high + 2e-5).all()
    if bench.name != "plain":
        largest = [max(np.flatnonzero(one.exponents)) for one in (before, after)]
        assert largest[0] == largest[1]


def test_members_of_other_groups_than_stated_are_noticed(tagging: Bench, random_update) -> None:
    made = Round(tagging, updates_of(random_update))
    encoded = bytearray(made.encoded())
    first = made.group_of.index(0)
    second = made.group_of.index(1)
    encoded[2 * first], encoded[2 * second] = 1, 0
    with pytest.raises(PeerFault):
        made.open(bytes(encoded))


def test_sums_that_cannot_be_are_refused(plain: Bench, random_update) -> None:
    made = Round(plain, updates_of(random_update))
    encoded = made.encoded()
    small = bytearray(encoded)
    small[2 * made.group_of.index(0)] = 1  # two in group 0
    beyond = bytearray(encoded)
    beyond[1] = 1
    for wrong in (bytes(small), bytes(beyond), encoded[:-1], encoded + b"\0" * 3, b"\0"):
        with pytest.raises(MalformedChunk):
            made.open(wrong)


def test_a_group_of_two_is_no_sum(bench: Bench, random_update) -> None:
    made = Round(bench, updates_of(random_update))
    fewer = GroupedTotal(made.group_of, lambda: bench.protection.accumulator(made.context))
    for member in [m for m in range(9) if m != made.group_of.index(2)]:
        encoded = bench.upload(made.context, member, updates_of(random_update)[member], 1)
        fewer.add(member, io.BytesIO(encoded))
    with pytest.raises(EmptyTotal, match="group 2"):
        fewer.result(None)


def test_a_correction_is_told_apart_by_groups() -> None:
    masks = tuple(Mask(hashlib.sha256(bytes([i])).digest()) for i in range(4))
    correction = Correction(masks, (0, 2, 0, 1))
    assert correction.of(0).masks == (masks[0], masks[2])
    assert correction.of(3).masks == ()
