"""The device's part in one run's attempts, as a state machine: no I/O, no clock.

    IDLE ─Join─▶ ADVERTISED ─Cohort─▶ SHARING ─Boxes─▶ MASKED ─UploadReady─▶ UPLOADING
                     ▲                                                          │Acceptance
                     └──────── Join of a later attempt or round ◀── any ──   ENDORSED
                              (of the same round: not once ENDORSED)            │Certificate
                                                                             RELEASED

`handle` returns the new state and what to send, or raises and changes nothing. What is repeated is
answered again with the same bytes. The caller must store the new state before it sends the answer,
and before the first byte of an upload leaves: all promises below are kept by what is stored.

The rules that protect the update, each checked here:

1. Attempts only rise. Joining one gives up the secrets of the one before, so that its masks are
   never released; and a round in which we vouched for a list is over for us: whether it was opened
   is not ours to know, and a second sum with the same update would show the difference.
2. One cohort in an attempt, one upload under its masks, one accepted list vouched for.
3. We vouch for a list only if it has our upload's hash and enough members, and release only for
   the list that we vouched for, once a quorum of its members vouches too: in each group of them.
4. A release holds, for each other member, the share of its seed or of its mask key: never both.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ..errors import (
    AcceptanceRefused,
    BadSignature,
    CertificateRefused,
    CohortRefused,
    Equivocation,
    IllegalStep,
    StaleAttempt,
    StepRefused,
)
from ..groups import MINIMUM_GROUP
from ..masks import Mask
from .identity import Verify
from .member_state import (
    Answer,
    Join,
    MemberEvent,
    MemberPhase,
    MemberState,
    MemberTools,
    UploadReady,
)
from .messages import Acceptance, Advertisement, Boxes, Certificate, Cohort, Endorsement, Release
from .quorum import SECRET_SIZE, enough, least_accepted, quorum
from .secrets import AttemptSecret, commitment, public_key, splits

_T = TypeVar("_T")


def masks(state: MemberState) -> tuple[Mask, ...]:
    """Return what `encoder` masks the update with; only before the upload's hash is fixed."""
    if state.phase is not MemberPhase.MASKED or state.cohort is None:
        raise IllegalStep("masks", "asked for while MASKED", state.phase.name)
    return _secret(state).masks(state.cohort, state.slot)


def handle(
    state: MemberState, event: MemberEvent, tools: MemberTools
) -> tuple[MemberState, Answer | None]:
    """Return the state after `event` and the answer to it. Store the first, then send the second.

    Raises a ProtocolFault for a message that must not be followed, IllegalStep for our own mistake;
    the state then stays as it was.
    """
    if isinstance(event, Join):
        return _join(state, event, tools)
    if event.attempt != state.attempt:
        raise StaleAttempt("attempt", state.attempt, event.attempt)
    handler = _TRANSITIONS.get((state.phase, type(event)))
    if handler is None:
        refusal = IllegalStep if isinstance(event, UploadReady) else StepRefused
        raise refusal("step", f"one for {state.phase.name}", type(event).__name__)
    return handler(state, event, tools)


Step = tuple[MemberState, Answer | None]


def _join(state: MemberState, event: Join, tools: MemberTools) -> Step:
    if len(event.secret) != SECRET_SIZE:
        raise IllegalStep("secret of an attempt", "32 bytes", f"{len(event.secret)} bytes")
    if event.attempt.run_id != state.attempt.run_id:
        raise IllegalStep("run", state.attempt.run_id.hex(), event.attempt.run_id.hex())
    same_round = event.attempt.round == state.attempt.round
    if state.phase >= MemberPhase.ENDORSED and same_round and event.attempt != state.attempt:
        raise StaleAttempt("round", "one in which we vouched for nothing", event.attempt.round)
    if state.phase is MemberPhase.RELEASED and same_round:
        raise StaleAttempt("round", "one without a release of ours", event.attempt.round)
    if event.attempt == state.attempt and state.phase is not MemberPhase.IDLE:
        return state, _advertisement(state, tools)  # asked again: the same keys
    if event.attempt <= state.attempt:
        raise StaleAttempt("attempt", f"one after {state.attempt}", event.attempt)
    joined = MemberState(state.agent_id, event.attempt, MemberPhase.ADVERTISED, event.secret)
    return joined, _advertisement(joined, tools)


def _advertisement(state: MemberState, tools: MemberTools) -> Advertisement:
    secret = _secret(state)
    keys = public_key(secret.mask_key), public_key(secret.share_key)
    hidden = commitment(secret.seed)
    unsigned = Advertisement(state.attempt, state.agent_id, *keys, hidden, bytes(64))
    return replace(unsigned, signature=tools.sign(unsigned.statement()))


def _take_up_cohort(state: MemberState, event: Cohort, tools: MemberTools) -> Step:
    members, policy = event.members, tools.policy
    slot = event.slot(state.agent_id)
    ours = _advertisement(state, tools).statement()
    if slot is None or members[slot].statement() != ours:
        raise CohortRefused("cohort", "us, with our keys, in it", "others")
    if len(members) < max(policy.minimum, event.minimum):
        least = max(policy.minimum, event.minimum)
        raise CohortRefused("members of the cohort", f"at least {least}", len(members))
    if event.groups != policy.groups:
        raise CohortRefused("groups of the cohort", policy.groups, event.groups)
    if event.groups > 1 and len(members) < event.groups * MINIMUM_GROUP:
        raise CohortRefused("members of a group", f"at least {MINIMUM_GROUP}", "fewer")
    for member in members:
        if not tools.verify(member.agent_id, member.statement(), member.signature):
            raise BadSignature("advertisement", f"one signed by {member.agent_id}", "another")
    sharing = replace(state, phase=MemberPhase.SHARING, cohort=event)
    return sharing, _our_boxes(sharing)


def _our_boxes(state: MemberState) -> Boxes:
    cohort, slot = _present(state.cohort), state.slot
    return Boxes(state.attempt, slot, _secret(state).boxes(cohort, slot))


def _repeat_cohort(state: MemberState, event: Cohort, tools: MemberTools) -> Step:
    if event.digest != _present(state.cohort).digest:
        raise Equivocation("cohort", "the one that we took up", "another")
    return state, None if state.phase is MemberPhase.RELEASED else _our_boxes(state)


def _take_up_boxes(state: MemberState, event: Boxes, tools: MemberTools) -> Step:
    cohort, slot = _present(state.cohort), state.slot
    received = _secret(state).opened(cohort, slot, event.boxes)
    return replace(state, phase=MemberPhase.MASKED, received=received), None


def _ignore(state: MemberState, event: MemberEvent, tools: MemberTools) -> Step:
    return state, None


def _fix_upload(state: MemberState, event: UploadReady, tools: MemberTools) -> Step:
    return replace(state, phase=MemberPhase.UPLOADING, upload=event.sha256), None


def _repeat_upload(state: MemberState, event: UploadReady, tools: MemberTools) -> Step:
    if event.sha256 != state.upload:  # two updates under the same masks would show their difference
        raise IllegalStep("upload", "the one that was fixed", "another")
    return state, None


def _endorse(state: MemberState, event: Acceptance, tools: MemberTools) -> Step:
    cohort = _present(state.cohort)
    n = len(cohort.members)
    if event.cohort != cohort.digest:
        raise Equivocation("cohort of the accepted list", "the one that we took up", "another")
    if (state.slot, state.upload) not in event.uploads:
        raise AcceptanceRefused("accepted list", "our upload as we sent it", "another or none")
    minimum = max(cohort.minimum, tools.policy.minimum)
    least = minimum if cohort.groups > 1 else least_accepted(n, minimum)
    if len(event.uploads) < least or event.slots[-1] >= n:
        raise AcceptanceRefused("accepted list", f"{least} .. {n} members", len(event.uploads))
    if not enough(cohort.group_of, event.slots, lambda size: least_accepted(size, 1)):
        raise AcceptanceRefused("accepted list", "a quorum of each group", "fewer of one")
    endorsed = replace(state, phase=MemberPhase.ENDORSED, acceptance=event)
    return endorsed, _endorsement(endorsed, tools)


def _repeat_acceptance(state: MemberState, event: Acceptance, tools: MemberTools) -> Step:
    if event != state.acceptance:
        raise Equivocation("accepted list", "the one that we vouched for", "another")
    return state, _endorsement(state, tools)


def _endorsement(state: MemberState, tools: MemberTools) -> Endorsement:
    signature = tools.sign(_present(state.acceptance).statement())
    return Endorsement(state.attempt, state.slot, signature)


def _release(state: MemberState, event: Certificate, tools: MemberTools) -> Step:
    cohort, acceptance = _present(state.cohort), _present(state.acceptance)
    if event.acceptance != acceptance.digest:
        raise Equivocation("certified list", "the one that we vouched for", "another")
    _check_certificate(cohort, acceptance, event, tools.verify)
    accepted, slot = set(acceptance.slots), state.slot
    others = [other for other in range(len(cohort.members)) if other != slot]
    shares = []
    for other, joined in zip(others, state.received, strict=True):
        of_seed, of_mask_key = splits(joined)
        shares.append(of_seed if other in accepted else of_mask_key)
    release = Release(state.attempt, slot, _secret(state).seed, tuple(shares))
    # The secret and the other shares are forgotten: nothing else can ever be released.
    return (
        replace(state, phase=MemberPhase.RELEASED, secret=b"", received=(), release=release),
        release,
    )


def _check_certificate(
    cohort: Cohort, acceptance: Acceptance, certificate: Certificate, verify: Verify
) -> None:
    accepted, statement = set(acceptance.slots), acceptance.statement()
    needed = quorum(len(cohort.members))
    if len(certificate.endorsements) < needed:
        raise CertificateRefused("endorsements", needed, len(certificate.endorsements))
    for slot, signature in certificate.endorsements:
        if slot not in accepted:
            raise CertificateRefused("endorsement", "one by an accepted member", f"slot {slot}")
        if not verify(cohort.members[slot].agent_id, statement, signature):
            raise CertificateRefused("endorsement", f"signed by slot {slot}", "another")
    if not enough(cohort.group_of, (slot for slot, _ in certificate.endorsements), quorum):
        raise CertificateRefused("endorsements", "a quorum of each group", "fewer of one")


def _repeat_release(state: MemberState, event: Certificate, tools: MemberTools) -> Step:
    if event.acceptance != _present(state.acceptance).digest:
        raise Equivocation("certified list", "the one that we released for", "another")
    return state, state.release


def _secret(state: MemberState) -> AttemptSecret:
    return AttemptSecret(state.secret, state.attempt)


def _present(value: _T | None) -> _T:
    if value is None:
        raise IllegalStep("state of a member", "what its phase implies", "a gap")
    return value


_AFTER_COHORT = tuple(phase for phase in MemberPhase if phase >= MemberPhase.SHARING)
_AFTER_BOXES = tuple(phase for phase in MemberPhase if phase >= MemberPhase.MASKED)
_AFTER_UPLOAD = tuple(phase for phase in MemberPhase if phase >= MemberPhase.UPLOADING)

_TRANSITIONS: dict[tuple[MemberPhase, type[MemberEvent]], Callable[..., Step]] = {
    (MemberPhase.ADVERTISED, Cohort): _take_up_cohort,
    (MemberPhase.SHARING, Boxes): _take_up_boxes,
    (MemberPhase.MASKED, UploadReady): _fix_upload,
    (MemberPhase.UPLOADING, Acceptance): _endorse,
    (MemberPhase.ENDORSED, Certificate): _release,
    # what may be repeated, and is answered again
    **{(phase, Cohort): _repeat_cohort for phase in _AFTER_COHORT},
    **{(phase, Boxes): _ignore for phase in _AFTER_BOXES},
    **{(phase, UploadReady): _repeat_upload for phase in _AFTER_UPLOAD},
    (MemberPhase.ENDORSED, Acceptance): _repeat_acceptance,
    (MemberPhase.RELEASED, Acceptance): _repeat_acceptance,
    (MemberPhase.RELEASED, Certificate): _repeat_release,
}
