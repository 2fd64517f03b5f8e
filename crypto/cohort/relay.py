"""The coordinator's part in one attempt, as a state machine: no I/O, no clock, no secrets.

    SHARING ─all Boxes─▶ COLLECTING ─all Uploaded, or CloseUploads─▶ VOUCHING
    ─a quorum of Endorsements─▶ RELEASING ─all Releases, or CloseReleases─▶ CORRECTED

`Close…` are the caller's deadlines. Where an attempt cannot go on it ends ABANDONED with the effect
`Abandon(survivors)`: before VOUCHING the survivors may re-form as the next attempt of the round;
from then on there are none, since who vouched is out of this round: the next round trains anew.

An honest coordinator does not need to be trusted for privacy, so it checks only what would make an
honest attempt fail: signatures, commitments, recovered keys. An advertisement is checked when it
comes (`check_advertisement`), so that one bad key does not spoil a cohort. `repeat` gives a member
that connects again what it has missed.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..errors import (
    BadSignature,
    IllegalStep,
    MalformedMessage,
    ShareMismatch,
    StaleAttempt,
    StepRefused,
)
from .identity import Verify
from .messages import (
    Acceptance,
    Advertisement,
    AttemptId,
    Boxes,
    Certificate,
    Cohort,
    Endorsement,
    Message,
    Release,
)
from .quorum import enough, least_accepted, quorum
from .recovery import check_advertised_keys, check_release, correction, recoverable
from .relay_state import (
    Abandon,
    CloseReleases,
    CloseSharing,
    CloseUploads,
    CloseVouching,
    Correct,
    RelayEffect,
    RelayEvent,
    RelayPhase,
    RelayState,
    Send,
    Uploaded,
)

Step = tuple[RelayState, tuple[RelayEffect, ...]]

_OURS = (CloseSharing, Uploaded, CloseUploads, CloseVouching, CloseReleases)


def check_advertisement(advertisement: Advertisement, verify: Verify) -> None:
    """Refuse one with which a cohort would fail; raises BadSignature or MalformedMessage."""
    name = advertisement.agent_id
    if not verify(name, advertisement.statement(), advertisement.signature):
        raise BadSignature("advertisement", f"one signed by {name}", "another")
    check_advertised_keys(advertisement)


def new_attempt(
    attempt: AttemptId, minimum: int, advertisements: Iterable[Advertisement], groups: int = 1
) -> RelayState:
    """Form the cohort of those who advertised; `check_advertisement` has passed each."""
    members = tuple(sorted(advertisements, key=lambda member: member.agent_id.encode()))
    if len(members) < minimum:
        raise IllegalStep("members of the cohort", f"at least {minimum}", len(members))
    return RelayState(Cohort(attempt, minimum, members, groups))


def handle(state: RelayState, event: RelayEvent, verify: Verify) -> Step:
    """Return the state after `event` and what to do. Store the first, then do the second.

    Raises a ProtocolFault for a member's message that is refused, IllegalStep for our own mistake;
    the state then stays as it was.
    """
    ours = isinstance(event, _OURS)
    if event.attempt != state.attempt:
        raise (IllegalStep if ours else StaleAttempt)("attempt", state.attempt, event.attempt)
    handler = _TRANSITIONS.get((state.phase, type(event)))
    if handler is None:
        refusal = IllegalStep if ours else StepRefused
        raise refusal("step", f"one for {state.phase.name}", type(event).__name__)
    return handler(state, event, verify)


def repeat(state: RelayState, agent_id: str) -> tuple[Send, ...]:
    """Return what a member that connects again may have missed; it ignores what it has.

    Who is not in the accepted list is told nothing of it: it would have to refuse it.
    """
    slot = state.cohort.slot(agent_id)
    if slot is None or state.phase is RelayPhase.ABANDONED:
        return ()
    missed: list[Message] = [state.cohort]
    if state.phase >= RelayPhase.COLLECTING:
        missed.append(_boxes_for(state, slot))
    if state.acceptance is not None and slot in state.acceptance.slots:
        missed += [m for m in (state.acceptance, state.certificate) if m is not None]
    return tuple(Send(agent_id, message) for message in missed)


def _collect_boxes(state: RelayState, event: Boxes, verify: Verify) -> Step:
    n = _size(state)
    if event.slot >= n or len(event.boxes) != n - 1:
        raise MalformedMessage("boxes", f"{n - 1} of one of {n} members", len(event.boxes))
    boxes = {**state.boxes, event.slot: event}
    if event.slot in state.boxes and state.boxes[event.slot] != event:
        raise StepRefused("boxes", "the same as before", "others")
    if len(boxes) < n:
        return replace(state, boxes=boxes), ()
    collecting = replace(state, phase=RelayPhase.COLLECTING, boxes=boxes)
    members = state.cohort.members
    return collecting, tuple(
        Send(member.agent_id, _boxes_for(collecting, slot)) for slot, member in enumerate(members)
    )


def _boxes_for(state: RelayState, recipient: int) -> Boxes:
    """Gather the boxes for one member: the sender left itself out of its list."""
    gathered = (
        state.boxes[sender].boxes[recipient - (recipient > sender)]
        for sender in range(_size(state))
        if sender != recipient
    )
    return Boxes(state.attempt, recipient, tuple(gathered))


def _close_sharing(state: RelayState, event: CloseSharing, verify: Verify) -> Step:
    return _abandon(state, _names(state, state.boxes))


def _count_upload(state: RelayState, event: Uploaded, verify: Verify) -> Step:
    if event.slot >= _size(state) or event.slot in state.uploads:
        raise IllegalStep("slot of an upload", "a member's, for the first time", event.slot)
    uploads = {**state.uploads, event.slot: event.sha256}
    counted = replace(state, uploads=uploads)
    if len(uploads) < _size(state):
        return counted, ()
    return _accept(counted)


def _close_uploads(state: RelayState, event: CloseUploads, verify: Verify) -> Step:
    few = len(state.uploads) < state.cohort.minimum
    if few or not enough(state.cohort.group_of, state.uploads, lambda m: least_accepted(m, 1)):
        return _abandon(state, _names(state, state.uploads))
    return _accept(state)


def _accept(state: RelayState) -> Step:
    uploads = tuple(sorted(state.uploads.items()))
    acceptance = Acceptance(state.attempt, state.cohort.digest, uploads)
    vouching = replace(state, phase=RelayPhase.VOUCHING, acceptance=acceptance)
    return vouching, _to_accepted(vouching, acceptance)


def _endorse(state: RelayState, event: Endorsement, verify: Verify) -> Step:
    cohort, acceptance = state.cohort, _acceptance(state)
    if event.slot not in acceptance.slots:
        raise StepRefused("endorsement", "one by an accepted member", f"slot {event.slot}")
    name = cohort.members[event.slot].agent_id
    if not verify(name, acceptance.statement(), event.signature):
        raise BadSignature("endorsement", f"one signed by {name}", "another")
    endorsements = {**state.endorsements, event.slot: event}
    endorsed = replace(state, endorsements=endorsements)
    if not enough(cohort.group_of, endorsements, quorum):
        return endorsed, ()
    rows = tuple(sorted((slot, e.signature) for slot, e in endorsements.items()))
    certificate = Certificate(state.attempt, acceptance.digest, rows)
    releasing = replace(endorsed, phase=RelayPhase.RELEASING, certificate=certificate)
    return releasing, _to_accepted(releasing, certificate)


def _close_vouching(state: RelayState, event: CloseVouching, verify: Verify) -> Step:
    return _abandon(state, ())  # who vouched is out of this round, and the others are too few


def _take_release(state: RelayState, event: Release, verify: Verify) -> Step:
    check_release(state.cohort, _acceptance(state), event)
    releases = {**state.releases, event.slot: event}
    released = replace(state, releases=releases)
    if set(releases) != set(_acceptance(state).slots):
        return released, ()
    return _correct(released)


def _close_releases(state: RelayState, event: CloseReleases, verify: Verify) -> Step:
    if not recoverable(state.cohort, _acceptance(state), state.releases):
        return _abandon(state, ())  # who released is out of this round, and the others are too few
    return _correct(state)


def _correct(state: RelayState) -> Step:
    try:
        removed = correction(state.cohort, _acceptance(state), state.releases)
    except ShareMismatch:  # a member lied about a share that nobody can replace
        return _abandon(state, ())
    return replace(state, phase=RelayPhase.CORRECTED), (Correct(removed),)


def _ignore(state: RelayState, event: RelayEvent, verify: Verify) -> Step:
    return state, ()


def _abandon(state: RelayState, survivors: Iterable[str]) -> Step:
    return replace(state, phase=RelayPhase.ABANDONED), (Abandon(tuple(survivors)),)


def _names(state: RelayState, slots: Iterable[int]) -> list[str]:
    return [state.cohort.members[slot].agent_id for slot in sorted(slots)]


def _to_accepted(state: RelayState, message: Message) -> tuple[Send, ...]:
    return tuple(Send(name, message) for name in _names(state, _acceptance(state).slots))


def _size(state: RelayState) -> int:
    return len(state.cohort.members)


def _acceptance(state: RelayState) -> Acceptance:
    if state.acceptance is None:
        raise IllegalStep("state of a relay", "an accepted list", "none")
    return state.acceptance


_AFTER_SHARING = tuple(phase for phase in RelayPhase if phase >= RelayPhase.COLLECTING)

_TRANSITIONS: dict[tuple[RelayPhase, type[RelayEvent]], Callable[..., Step]] = {
    (RelayPhase.SHARING, Boxes): _collect_boxes,
    (RelayPhase.SHARING, CloseSharing): _close_sharing,
    (RelayPhase.COLLECTING, Uploaded): _count_upload,
    (RelayPhase.COLLECTING, CloseUploads): _close_uploads,
    (RelayPhase.VOUCHING, Endorsement): _endorse,
    (RelayPhase.VOUCHING, CloseVouching): _close_vouching,
    (RelayPhase.RELEASING, Release): _take_release,
    (RelayPhase.RELEASING, CloseReleases): _close_releases,
    # late or repeated, and of no more use
    **{(phase, Boxes): _ignore for phase in _AFTER_SHARING},
    (RelayPhase.RELEASING, Endorsement): _ignore,
    (RelayPhase.CORRECTED, Endorsement): _ignore,
    (RelayPhase.ABANDONED, Endorsement): _ignore,
    (RelayPhase.CORRECTED, Release): _ignore,
    (RelayPhase.ABANDONED, Release): _ignore,
    # the caller's deadlines may fire late
    **{(phase, CloseSharing): _ignore for phase in _AFTER_SHARING},
    **{(phase, CloseUploads): _ignore for phase in RelayPhase if phase > RelayPhase.COLLECTING},
    **{(phase, CloseVouching): _ignore for phase in RelayPhase if phase > RelayPhase.VOUCHING},
    **{(phase, CloseReleases): _ignore for phase in RelayPhase if phase > RelayPhase.RELEASING},
}
