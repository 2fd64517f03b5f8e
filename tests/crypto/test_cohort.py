"""One attempt, step by step: what members and relay do, and everything that they refuse."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.cohort import (
    Acceptance,
    Certificate,
    CloseReleases,
    CloseSharing,
    CloseUploads,
    CloseVouching,
    Cohort,
    Join,
    MemberPhase,
    MemberState,
    RelayPhase,
    Uploaded,
    UploadReady,
    check_advertisement,
    decode,
    ed25519_signer,
    ed25519_valid,
    handle_relay,
    masks,
    new_attempt,
    quorum,
    repeat,
    threshold,
    tolerated,
)
from crypto.cohort.quorum import complete, least_accepted, neighbours
from crypto.cohort.shamir import PRIME, deal, recover
from crypto.errors import (
    AcceptanceRefused,
    BadSignature,
    CertificateRefused,
    CohortRefused,
    Equivocation,
    IllegalStep,
    MalformedMessage,
    ShareMismatch,
    SharesRefused,
    StaleAttempt,
    StepRefused,
)

from .cohorts import Federation, attempt_of, sign_as, verify
from .test_parameters import is_prime


@pytest.mark.parametrize("count", [3, 4, 7, 33])
def test_everyone_stays_and_the_sum_opens(count):
    federation = Federation(count)
    federation.join()
    federation.run()
    assert federation.relay.phase is RelayPhase.CORRECTED
    assert len(federation.accepted()) == count
    federation.check_sum()


def test_a_sparse_cohort_opens_and_needs_everyone():
    federation = Federation(70)
    federation.join()
    federation.run()
    federation.check_sum()
    assert len(neighbours(federation.relay.cohort.digest, 70, 0)) == 64


@pytest.mark.parametrize("count", [4, 7, 10])
def test_who_vanishes_after_uploading_is_in_the_sum(count):
    """Its seed comes from shares; nobody uploads again."""
    federation = Federation(count)
    federation.join()
    gone = f"agent-{count - 2:04}"
    while federation.relay.phase < RelayPhase.VOUCHING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    federation.gone.add(gone)
    federation.run()
    assert federation.relay.phase is RelayPhase.RELEASING
    federation.tell(CloseReleases(federation.relay.attempt))
    assert federation.devices[gone] in federation.accepted()
    federation.check_sum()


@pytest.mark.parametrize("count", [4, 7, 10])
def test_who_vanishes_before_uploading_is_not_in_the_sum(count):
    federation = Federation(count)
    federation.join()
    gone = federation.devices["agent-0001"]
    federation.upload = lambda device: (
        Federation.upload(federation, device) if device is not gone else None
    )
    federation.run()
    assert federation.relay.phase is RelayPhase.COLLECTING
    federation.gone.add("agent-0001")
    federation.tell(CloseUploads(federation.relay.attempt))
    federation.run()
    federation.tell(CloseReleases(federation.relay.attempt))
    assert gone not in federation.accepted()
    federation.check_sum()


def test_too_few_uploads_re_form_as_the_next_attempt():
    federation = Federation(4)
    federation.join()
    quiet = {"agent-0001", "agent-0003"}
    federation.upload = lambda device: (
        Federation.upload(federation, device) if device.agent_id not in quiet else None
    )
    federation.run()
    federation.tell(CloseUploads(federation.relay.attempt))
    assert federation.relay.phase is RelayPhase.ABANDONED
    assert federation.survivors == ("agent-0000", "agent-0002")
    del federation.upload
    federation.open(attempt_of(attempt=2))
    federation.join("agent-0000", "agent-0002", "agent-0003")
    federation.run()
    assert len(federation.accepted()) == 3
    federation.check_sum()


def test_missing_shares_abandon_the_attempt_and_name_who_dealt():
    federation = Federation(4)
    federation.join()
    federation.gone.add("agent-0002")
    federation.run()
    federation.tell(CloseSharing(federation.relay.attempt))
    assert federation.survivors == ("agent-0000", "agent-0001", "agent-0003")


def test_too_few_who_vouch_abandon_the_attempt_before_anything_is_released():
    federation = Federation(4)
    federation.join()
    while federation.relay.phase < RelayPhase.VOUCHING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    federation.gone |= {"agent-0000", "agent-0001"}
    federation.run()
    federation.tell(CloseVouching(federation.relay.attempt))
    assert federation.survivors == ()
    federation.open(attempt_of(2))
    federation.join()
    federation.run()
    federation.check_sum()


@pytest.mark.parametrize("lies", [1, 2])
def test_a_wrong_share_is_stepped_over_where_there_are_others(lies):
    federation = _until_releasing(7)
    liars = 0
    while federation.queue:
        effect = federation.queue.popleft()
        answer = federation.devices[effect.agent_id].take(effect.message)
        if effect.agent_id == "agent-0006":
            continue  # vanishes
        if liars < lies:
            answer = replace(answer, shares=tuple(bytes(33) for _ in answer.shares))
            liars += 1
        federation.tell(answer)
    federation.tell(CloseReleases(federation.relay.attempt))
    if lies == 1:
        federation.check_sum()  # 6 shares, 5 needed
    else:
        assert federation.relay.phase is RelayPhase.ABANDONED


def test_a_seed_that_was_not_committed_to_is_refused():
    federation = _until_releasing(4)
    effect = federation.queue.popleft()
    answer = federation.devices[effect.agent_id].take(effect.message)
    before = federation.relay
    with pytest.raises(ShareMismatch):
        federation.tell(replace(answer, seed=bytes(32)))
    assert federation.relay is before


def _until_releasing(count):
    federation = Federation(count)
    federation.join()
    while federation.relay.phase < RelayPhase.RELEASING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    for device in federation.devices.values():  # so that only certificates are under way
        device.take(federation.relay.acceptance)
    kept = [e for e in federation.queue if isinstance(e.message, Certificate)]
    federation.queue.clear()
    federation.queue.extend(kept)
    return federation


# what a member refuses: state before, the message, the error


@pytest.fixture
def advertised():
    """Four devices that have advertised, and their cohort."""
    federation = Federation(4)
    federation.join()
    return federation, federation.relay.cohort


@pytest.fixture
def uploading():
    """Four devices that have uploaded, and the honest accepted list."""
    federation = Federation(4)
    federation.join()
    while federation.relay.phase < RelayPhase.VOUCHING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    return federation, federation.relay.acceptance


def refuses(device, message, refusal):
    before = device.state
    with pytest.raises(refusal):
        device.take(message)
    assert device.state is before


def certificate_of(federation, acceptance, slots):
    members = federation.relay.cohort.members
    rows = tuple((s, sign_as(members[s].agent_id)(acceptance.statement())) for s in slots)
    return Certificate(acceptance.attempt, acceptance.digest, rows)


def test_cohorts_that_a_member_refuses(advertised):
    federation, cohort = advertised
    device = federation.devices["agent-0001"]
    refuses(device, replace(cohort, members=cohort.members[2:]), CohortRefused)  # without us
    refuses(device, replace(cohort, members=cohort.members[:2]), CohortRefused)  # too few
    refuses(device, replace(cohort, minimum=5), CohortRefused)
    swapped = replace(cohort.members[1], mask_key=bytes(32))
    members = (cohort.members[0], swapped, *cohort.members[2:])
    refuses(device, replace(cohort, members=members), CohortRefused)  # with other keys of ours
    forged = replace(cohort.members[0], mask_key=cohort.members[2].mask_key)
    members = (forged, *cohort.members[1:])
    refuses(device, replace(cohort, members=members), BadSignature)
    with pytest.raises(MalformedMessage):
        replace(cohort, members=(cohort.members[0], *cohort.members))
    with pytest.raises(MalformedMessage):
        replace(cohort, members=cohort.members[::-1])
    with pytest.raises(MalformedMessage):
        replace(cohort, attempt=attempt_of(attempt=2))


@pytest.mark.parametrize("which", ["mask_key", "share_key"])
def test_an_advertisement_with_a_key_of_low_order_is_refused(advertised, which):
    _, cohort = advertised
    stale = cohort.members[0]
    check_advertisement(stale, verify)
    forged = replace(stale, **{which: bytes(32)})
    with pytest.raises(BadSignature):
        check_advertisement(forged, verify)
    forged = replace(forged, signature=sign_as(stale.agent_id)(_statement(forged)))
    with pytest.raises(MalformedMessage):
        check_advertisement(forged, verify)


def test_no_cohort_is_formed_of_fewer_than_its_minimum(advertised):
    _, cohort = advertised
    assert new_attempt(cohort.attempt, 4, cohort.members[::-1]).cohort.members == cohort.members
    with pytest.raises(IllegalStep):
        new_attempt(cohort.attempt, 5, cohort.members)


def _statement(advertisement):
    return replace(advertisement, signature=bytes(64)).statement()


def test_another_cohort_in_the_same_attempt_is_equivocation(advertised):
    federation, cohort = advertised
    device = federation.devices["agent-0001"]
    first = device.take(cohort)
    assert device.take(cohort) == first  # repeated: the same bytes
    refuses(device, replace(cohort, members=cohort.members[:3]), Equivocation)


def test_boxes_that_a_member_refuses(advertised):
    federation, cohort = advertised
    boxes = {name: device.take(cohort) for name, device in federation.devices.items()}
    for answer in boxes.values():
        federation.tell(answer)
    sent = next(e.message for e in federation.queue if type(e.message).__name__ == "Boxes")
    device = federation.devices["agent-0000"]
    refuses(device, replace(sent, boxes=sent.boxes[1:]), SharesRefused)
    refuses(device, replace(sent, boxes=sent.boxes[::-1]), SharesRefused)
    flipped = bytes([sent.boxes[0][0] ^ 1]) + sent.boxes[0][1:]
    refuses(device, replace(sent, boxes=(flipped, *sent.boxes[1:])), SharesRefused)
    assert device.take(sent) is None
    assert device.state.phase is MemberPhase.MASKED


def test_accepted_lists_that_a_member_refuses(uploading):
    federation, acceptance = uploading
    device = federation.devices["agent-0001"]
    rows = acceptance.uploads
    others = (rows[0], (1, bytes(32)), *rows[2:])
    refuses(device, replace(acceptance, uploads=others), AcceptanceRefused)  # another upload
    refuses(device, replace(acceptance, uploads=rows[2:]), AcceptanceRefused)  # without us
    refuses(device, replace(acceptance, uploads=rows[:2]), AcceptanceRefused)  # too few
    refuses(device, replace(acceptance, uploads=(*rows, (4, bytes(32)))), AcceptanceRefused)
    refuses(device, replace(acceptance, cohort=bytes(32)), Equivocation)
    first = device.take(acceptance)
    assert device.take(acceptance) == first
    refuses(device, replace(acceptance, uploads=rows[:3]), Equivocation)


def test_certificates_that_a_member_refuses(uploading):
    federation, acceptance = uploading
    device = federation.devices["agent-0001"]
    good = certificate_of(federation, acceptance, (0, 1, 2))
    refuses(device, good, StepRefused)  # before we vouched
    device.take(acceptance)
    refuses(device, certificate_of(federation, acceptance, (0, 1)), CertificateRefused)
    forged = replace(good, endorsements=(*good.endorsements[:2], (2, bytes(64))))
    refuses(device, forged, CertificateRefused)
    outsider = replace(good, endorsements=(*good.endorsements[:2], (9, bytes(64))))
    refuses(device, outsider, CertificateRefused)
    other = replace(acceptance, uploads=acceptance.uploads[:3])
    refuses(device, certificate_of(federation, other, (0, 1, 2)), Equivocation)
    release = device.take(good)
    assert device.take(good) == release  # repeated: the same bytes
    assert device.take(certificate_of(federation, acceptance, (1, 2, 3))) == release
    refuses(device, certificate_of(federation, other, (0, 1, 2)), Equivocation)
    assert device.state.secret == b""
    assert device.state.received == ()


def test_a_member_never_releases_in_a_second_attempt_of_a_round(uploading):
    federation, acceptance = uploading
    device = federation.devices["agent-0001"]
    device.take(acceptance)
    device.take(certificate_of(federation, acceptance, (0, 1, 2)))
    device.restart()
    later = attempt_of(attempt=2)
    refuses(device, Join(later, bytes(32)), StaleAttempt)
    assert device.join(attempt_of(2)).attempt == attempt_of(2)
    refuses(device, acceptance, StaleAttempt)
    refuses(device, Join(attempt_of(1, 9), bytes(32)), StaleAttempt)


def test_joining_the_next_attempt_gives_up_the_one_before(uploading):
    federation, acceptance = uploading
    device = federation.devices["agent-0001"]
    device.join(attempt_of(attempt=2))
    refuses(device, certificate_of(federation, acceptance, (0, 1, 2)), StaleAttempt)
    refuses(device, Join(attempt_of(), bytes(32)), StaleAttempt)


def test_our_own_mistakes_are_not_the_peers(advertised):
    federation, cohort = advertised
    device = federation.devices["agent-0000"]
    refuses(device, UploadReady(cohort.attempt, bytes(32)), IllegalStep)
    refuses(device, Join(attempt_of(2), b"short"), IllegalStep)
    refuses(device, Join(attempt_of(2, run_id=bytes(16)), bytes(32)), IllegalStep)
    with pytest.raises(IllegalStep):
        masks(device.state)
    with pytest.raises(IllegalStep):
        handle_relay(federation.relay, Uploaded(cohort.attempt, 0, bytes(32)), verify)


def test_masks_are_given_for_one_upload(uploading):
    federation, _ = uploading
    device = federation.devices["agent-0001"]
    device.take(UploadReady(device.state.attempt, device.state.upload))
    refuses(device, UploadReady(device.state.attempt, bytes(32)), IllegalStep)
    with pytest.raises(IllegalStep):
        masks(device.state)


def test_nothing_shows_a_secret(uploading):
    federation, acceptance = uploading
    for device in federation.devices.values():
        device.take(acceptance)
        release = device.take(certificate_of(federation, acceptance, (0, 1, 2)))
        for text in (repr(device.state), repr(release), repr(Join(attempt_of(), b"s" * 32))):
            assert repr(release.seed)[2:-1] not in text
            assert "ssss" not in text


# numbers


@pytest.mark.parametrize("n", range(2, 200))
def test_the_claims_hold_for_as_many_colluders_as_stated(n):
    c, q, t = tolerated(n), quorum(n), threshold(n)
    assert 2 * q > n + c  # no two certified lists: an honest member vouches once
    assert c < t <= max(1, n - 1)  # colluders recover nothing alone; one may vanish from n = 4 on
    assert q - c >= 2  # at least so many honest members in a sum
    assert q <= n
    if n >= 4:
        assert n - 1 >= q
        assert n - 2 + 1 >= t


def test_known_quorums():
    numbers = [2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 32, 64, 100]
    assert [quorum(n) for n in numbers] == [2, 3, 3, 4, 5, 5, 6, 7, 7, 11, 22, 43, 67]
    assert [tolerated(n) for n in numbers] == [0, 1, 1, 2, 3, 2, 3, 4, 3, 5, 11, 21, 33]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 300), st.binary(min_size=32, max_size=32))
def test_neighbours_are_mutual_and_as_many_as_stated(n, digest):
    near = [set(neighbours(digest, n, slot)) for slot in range(n)]
    assert all(slot not in near[slot] for slot in range(n))
    assert all(slot in near[other] for slot in range(n) for other in near[slot])
    assert {len(others) for others in near} == {min(n - 1, 64)}
    assert complete(n) == (n <= 65)
    assert least_accepted(n, 2) == (quorum(n) if n <= 65 else n)


def test_the_field_of_shares_is_the_smallest_prime_above_2_256():
    assert is_prime(PRIME)
    assert not any(is_prime((1 << 256) + i) for i in range(297))


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.randoms())
def test_any_threshold_of_shares_recovers_and_fewer_do_not(secret, needed, random):
    holders = random.sample(range(500), 10)
    randomness = random.randbytes(48 * (needed - 1))
    shares = deal(secret, randomness, holders)
    chosen = random.sample(holders, needed)
    assert recover({slot: shares[slot] for slot in chosen}, needed) == secret
    with pytest.raises(ShareMismatch):
        recover({slot: shares[slot] for slot in chosen[1:]}, needed)


def test_fewer_shares_fit_every_secret():
    """Two shares of a line are consistent with any secret: another polynomial gives them too."""
    share = deal(bytes(32), bytes(range(48)), [4])[4]
    other = b"\1" + bytes(31)
    slope = (int.from_bytes(share, "little") - 1) * pow(5, -1, PRIME) % PRIME
    assert deal(other, slope.to_bytes(48, "little"), [4])[4] == share


# bytes and restarts


def test_states_and_messages_survive_a_restart_at_every_step():
    federation = Federation(4)
    federation.join()
    while federation.queue:
        effect = federation.queue.popleft()
        assert decode(effect.message.encode()) == effect.message
        federation.deliver(federation.devices[effect.agent_id], effect.message)
        for device in federation.devices.values():
            before = device.state
            device.restart()
            assert device.state == before
        again = federation.replayed()
        assert again == federation.relay
        federation.relay = again
    federation.check_sum()


def test_who_connects_again_is_told_what_it_missed():
    federation = Federation(4)
    federation.join()
    while federation.relay.phase < RelayPhase.RELEASING:
        effect = federation.queue.popleft()
        federation.deliver(federation.devices[effect.agent_id], effect.message)
    federation.queue.clear()  # every certificate is lost
    for name, device in federation.devices.items():
        for effect in repeat(federation.relay, name):
            answer = device.take(effect.message)
            if answer is not None:
                federation.tell(answer)
    federation.check_sum()
    assert repeat(federation.relay, "agent-9999") == ()


def test_signatures_are_ed25519():
    identity = Ed25519PrivateKey.generate()
    public = identity.public_key().public_bytes_raw()
    signature = ed25519_signer(identity)(b"statement")
    assert ed25519_valid(public, b"statement", signature)
    assert not ed25519_valid(public, b"another", signature)
    assert not ed25519_valid(public, b"statement", bytes(64))
    assert not ed25519_valid(b"short", b"statement", signature)


def test_the_coordinator_is_left_with_the_seeds_of_the_attempt():
    federation = Federation(4)
    federation.join()
    federation.run()
    for device in federation.devices.values():
        assert federation.relay.releases[device.state.slot].seed == device.state.release.seed
    assert isinstance(federation.relay.cohort, Cohort)
    assert isinstance(federation.relay.acceptance, Acceptance)
    assert MemberState.decode(device.state.encode()) == device.state
