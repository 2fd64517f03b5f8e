"""An agent against a coordinator that lies: every step is declined with a reason, none harms it."""

import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fedloom.errors import Reason, Refused, refusal_details
from fedloom.terms import Protection
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation
from tests.integration.rogue import (
    OTHER_RUN,
    PLAIN_CLIP,
    RUN,
    Rogue,
    invitation,
    rogue_coordinator,
)

Change = Callable[[control_pb2.Invitation], None]


@pytest.fixture
async def victim(federation: Federation) -> Agent:
    """Return an agent that joined while the coordinator was honest."""
    return await federation.enrol("victim")


@pytest.fixture
async def rogue(federation: Federation, victim: Agent) -> AsyncIterator[Rogue]:
    """Put the rogue in the coordinator's place and let the agent come."""
    async with rogue_coordinator(federation) as found:
        found.refuses_uploads = Refused(Reason.TOO_LARGE, "expected nothing")
        victim.start()
        await found.hear("hello")
        yield found
        await victim.stop()


async def still_lives(federation: Federation, rogue: Rogue) -> None:
    """The agent trains for a proper invitation as if nothing had been said before."""
    rogue.say(invitation=invitation(federation, OTHER_RUN, Protection.PLAIN))
    assert (await rogue.hear("ready")).ready.run_id == OTHER_RUN


def setting(path: str, value: Any) -> Change:
    """Change one field of an invitation."""

    def change(message: control_pb2.Invitation) -> None:
        *way, last = path.split(".")
        target: Any = message
        for name in way:
            target = getattr(target, name)
        setattr(target, last, value)

    return change


def history(**fields: Any) -> Change:
    """Add a finished round to an invitation to round 2."""
    values: dict[str, Any] = {"round": 1, "attempt": 1, "weight_cap": 32, "slots": [0]}
    reference = control_pb2.ArtifactReference(sha256=bytes(32), size_bytes=100)

    def change(message: control_pb2.Invitation) -> None:
        message.round = 2
        message.history.add(**({"sum": reference} | values | fields))

    return change


def without_history(message: control_pb2.Invitation) -> None:
    """Invite to train from a state that the agent does not have."""
    message.round, message.previous_round = 2, 1


def levels_under_encryption(message: control_pb2.Invitation) -> None:
    """Ask for updates that nobody could add: before anything is trained for it."""
    message.training.compression = control_pb2.COMPRESSION_QUANTISED
    message.encoding.protection = control_pb2.PROTECTION_ENCRYPTED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("run_id", b""), Reason.MALFORMED),
        (setting("run_id", bytes(300)), Reason.MALFORMED),
        (setting("round", 0), Reason.MALFORMED),
        (setting("previous_round", 1), Reason.MALFORMED),
        (setting("release", 0), Reason.MALFORMED),
        (setting("release", 99), Reason.MALFORMED),
        (setting("minimum", 0), Reason.MALFORMED),
        (setting("minimum", 1 << 20), Reason.MALFORMED),
        (setting("plan.sha256", b""), Reason.MALFORMED),
        (setting("plan.sha256", bytes(32)), Reason.NOT_FOUND),
        (setting("plan.size_bytes", 1), Reason.PLAN_MISMATCH),
        (setting("attempt", 1 << 16), Reason.MALFORMED),
        (setting("plan.size_bytes", 1 << 40), Reason.MALFORMED),
        (setting("training.learning_rate", math.nan), Reason.MALFORMED),
        (setting("training.epochs", 0), Reason.MALFORMED),
        (setting("training.strategy", 0), Reason.MALFORMED),
        (setting("training.optimizer", 99), Reason.MALFORMED),
        (setting("training.compression", 99), Reason.MALFORMED),
        (setting("training.compression_share", 0.5), Reason.MALFORMED),
        (levels_under_encryption, Reason.MALFORMED),
        (setting("encoding.protection", 0), Reason.MALFORMED),
        (setting("encoding.protection", 99), Reason.MALFORMED),
        (setting("encoding.capacity", 0), Reason.MALFORMED),
        (setting("encoding.clip", math.inf), Reason.MALFORMED),
        (setting("encoding.update_bits", 7), Reason.MALFORMED),
        (setting("encoding.protection", control_pb2.PROTECTION_ENCRYPTED), Reason.KEY_UNAVAILABLE),
        (without_history, Reason.STATE_DIVERGED),
        (history(), Reason.NOT_FOUND),
        (history(round=2, previous_round=1), Reason.STATE_DIVERGED),
        (history(round=2, previous_round=2), Reason.MALFORMED),
        (history(attempt=1 << 16), Reason.MALFORMED),
        (history(slots=[]), Reason.MALFORMED),
        (history(slots=[1, 0]), Reason.MALFORMED),
        (history(weight_cap=0), Reason.MALFORMED),
        (history(sum=control_pb2.ArtifactReference(sha256=b"short")), Reason.MALFORMED),
    ],
)
async def test_an_invitation_out_of_order_is_declined(
    federation: Federation, victim: Agent, rogue: Rogue, change: Change, reason: Reason
) -> None:
    message = invitation(federation, RUN, Protection.PLAIN)
    change(message)
    rogue.say(invitation=message)
    assert await rogue.hear_refusal() is reason
    assert victim.engine.history == []
    await still_lives(federation, rogue)


@pytest.mark.parametrize(
    "envelope",
    [
        control_pb2.KeyEnvelope(key_id=1),
        control_pb2.KeyEnvelope(key_id=1, sender_id="victim", wrapped=bytes(64)),
        control_pb2.KeyEnvelope(key_id=1, sender_id="x" * 300, wrapped=bytes(64)),
    ],
)
async def test_a_run_key_that_does_not_open_is_declined(
    federation: Federation, victim: Agent, rogue: Rogue, envelope: control_pb2.KeyEnvelope
) -> None:
    for sender_key in (None, victim.identity.advertised_exchange_key()):
        if sender_key is not None:
            envelope.sender_key.CopyFrom(sender_key)
        rogue.say(
            invitation=invitation(federation, RUN, Protection.ENCRYPTED, envelopes=[envelope])
        )
        assert await rogue.hear_refusal() is Reason.KEY_UNAVAILABLE
        rogue.say(wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=1, envelope=envelope))
        assert await rogue.hear_refusal() is Reason.KEY_UNAVAILABLE
    await still_lives(federation, rogue)


@pytest.mark.parametrize("run_id", [b"", bytes(15), bytes(300)])
async def test_a_key_is_made_for_runs_with_a_name_only(
    federation: Federation, victim: Agent, rogue: Rogue, run_id: bytes
) -> None:
    recipient = control_pb2.KeyRecipient(
        agent_id=victim.name, exchange_key=victim.identity.advertised_exchange_key()
    )
    rogue.say(wrap_key=control_pb2.WrapKey(run_id=run_id, key_id=1, recipients=[recipient]))
    assert await rogue.hear_refusal() is Reason.MALFORMED
    await still_lives(federation, rogue)


async def test_a_key_is_wrapped_for_nobody_whose_key_does_not_verify(
    federation: Federation, victim: Agent, rogue: Rogue
) -> None:
    own = victim.identity.advertised_exchange_key()
    other_name = control_pb2.KeyRecipient(agent_id="coordinator", exchange_key=own)
    nameless = control_pb2.KeyRecipient(exchange_key=own)
    keyless = control_pb2.KeyRecipient(agent_id=victim.name)
    unsigned = control_pb2.ExchangeKey(public_key=bytes(32), certificate=own.certificate)
    weak = control_pb2.KeyRecipient(agent_id=victim.name, exchange_key=unsigned)
    recipients = [other_name, nameless, keyless, weak]
    rogue.say(wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=1, recipients=recipients))
    assert len((await rogue.hear("wrapped_key")).wrapped_key.envelopes) == 0
    await still_lives(federation, rogue)


async def test_steps_that_come_before_their_invitation_are_declined(
    federation: Federation, rogue: Rogue
) -> None:
    rogue.say(cohort=control_pb2.Cohort(run_id=RUN, round=1, attempt=1, members=["victim"]))
    assert await rogue.hear_refusal() is Reason.WRONG_ROUND
    reference = control_pb2.ArtifactReference(sha256=bytes(32), size_bytes=1)
    outcome = control_pb2.RoundOutcome(round=1, weight_cap=1, slots=[0], sum=reference)
    rogue.say(result=control_pb2.Result(run_id=RUN, outcome=outcome))
    assert await rogue.hear_refusal() is Reason.WRONG_ROUND
    rogue.say(accepted=control_pb2.Accepted(run_id=RUN, round=1, attempt=1))
    rogue.say(finished=control_pb2.Finished(run_id=RUN, outcome=control_pb2.RUN_OUTCOME_COMPLETED))
    rogue.say()  # a step of a newer coordinator
    await still_lives(federation, rogue)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"round": 2}, Reason.WRONG_ROUND),
        ({"members": ["somebody"]}, Reason.NOT_IN_COHORT),
        ({"members": ["victim", "victim"]}, Reason.NOT_IN_COHORT),
        ({"weight_cap": 0}, Reason.MALFORMED),
        ({"weight_cap": 1}, Reason.WEIGHT_OUT_OF_RANGE),
        ({"attempt": 1 << 20}, Reason.MALFORMED),
        ({"attempt": 0}, Reason.MALFORMED),
        ({"clip": 0.0}, Reason.MALFORMED),
        ({"clip": math.nan}, Reason.MALFORMED),
        ({"clip": math.nextafter(PLAIN_CLIP, 2)}, Reason.MALFORMED),
        ({}, Reason.TOO_LARGE),  # what this coordinator answers to any upload
    ],
)
async def test_a_cohort_out_of_order_gets_no_update(
    federation: Federation, rogue: Rogue, fields: dict[str, Any], reason: Reason
) -> None:
    rogue.say(invitation=invitation(federation, RUN, Protection.PLAIN))
    await rogue.hear("ready")
    values: dict[str, Any] = {
        "round": 1,
        "attempt": 1,
        "members": ["victim"],
        "weight_cap": 32,
        "clip": PLAIN_CLIP,
    }
    rogue.say(cohort=control_pb2.Cohort(run_id=RUN, **(values | fields)))
    assert await rogue.hear_refusal() is reason
    await still_lives(federation, rogue)


async def test_a_refusal_that_only_a_person_can_mend_stops_the_agent(
    victim: Agent, rogue: Rogue
) -> None:
    refused = Refused(Reason.NOT_PERMITTED, "this device was banned")
    rogue.say(refusal=control_pb2.StepRefusal(details=refusal_details(refused)))
    error = await victim.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.NOT_PERMITTED


async def test_an_agent_whose_state_diverged_starts_from_the_plan_again(
    federation: Federation, rogue: Rogue
) -> None:
    diverged = Refused(Reason.STATE_DIVERGED, "expected another state")
    rogue.say(invitation=invitation(federation, RUN, Protection.PLAIN))
    await rogue.hear("ready")
    rogue.say(refusal=control_pb2.StepRefusal(run_id=RUN, details=refusal_details(diverged)))
    await still_lives(federation, rogue)
