"""An agent against a coordinator that lies: every step is declined with a reason, none harms it."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.authority import load_server_identity
from coordinator.round_sum import Upload
from coordinator.server import open_published
from coordinator.services.artifacts import ArtifactService
from coordinator.services.limits import Admission, Limits
from fedloom.errors import Reason, Refused, refusal_details
from fedloom.terms import Encoding, LocalTraining, Protection
from fedloom.v1 import artifact_pb2_grpc, control_pb2, control_pb2_grpc
from tests.integration.federation import PATIENCE_SECONDS, Agent, Federation

RUN, OTHER_RUN = bytes(range(16)), bytes(range(1, 17))
Change = Callable[[control_pb2.Invitation], None]


class NoRounds:
    """Wants no upload."""

    def upload_path(self, upload: Upload) -> Path | None:
        """Refuse."""
        raise Refused(Reason.TOO_LARGE, "expected nothing")

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Never called."""

    def count_traffic(self, agent: str, *, sent: int = 0, received: int = 0) -> None:
        """Count nothing."""


class Rogue(control_pb2_grpc.ControlServiceServicer):
    """Says what a test tells it to say, on the federation's own port, under its own certificate."""

    def __init__(self) -> None:
        self._to_say: asyncio.Queue[control_pb2.ConnectResponse] = asyncio.Queue()
        self._heard: asyncio.Queue[control_pb2.ConnectRequest] = asyncio.Queue()

    async def Connect(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[control_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[control_pb2.ConnectResponse]:
        """Say everything that is queued; keep what is heard."""
        listening = asyncio.create_task(self._listen(request_iterator))
        try:
            while True:
                yield await self._to_say.get()
        finally:
            listening.cancel()

    async def _listen(self, requests: AsyncIterator[control_pb2.ConnectRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("step") != "heartbeat":
                self._heard.put_nowait(request)

    def say(self, **step: Any) -> None:
        """Queue a message for the agent."""
        self._to_say.put_nowait(control_pb2.ConnectResponse(**step))

    async def hear(self, step: str) -> control_pb2.ConnectRequest:
        """Return the agent's next message, which must be this step."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            message = await self._heard.get()
        assert message.WhichOneof("step") == step, message
        return message

    async def hear_refusal(self) -> Reason:
        """Return the reason with which the agent declines."""
        return Reason((await self.hear("refusal")).refusal.details.reason)


@pytest.fixture
async def victim(federation: Federation) -> Agent:
    """Return an agent that joined while the coordinator was honest."""
    return await federation.enrol("victim")


@pytest.fixture
async def rogue(federation: Federation, victim: Agent) -> AsyncIterator[Rogue]:
    """Put the rogue in the coordinator's place and let the agent come."""
    federation.start_run("plain", rounds=1)  # publishes the plan
    await federation.stop()
    identity = load_server_identity(federation.home)
    server, found = grpc.aio.server(), Rogue()
    control_pb2_grpc.add_ControlServiceServicer_to_server(found, server)
    published = open_published(federation.home).folder
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactService(published, federation.store, NoRounds(), Admission(Limits())), server
    )
    pair = [(identity.private_key, identity.certificate)]
    credentials = grpc.ssl_server_credentials(pair, identity.authority, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{federation.control_port}", credentials)
    await server.start()
    victim.start()
    await found.hear("hello")
    yield found
    await victim.stop()
    await server.stop(None)


def invitation(federation: Federation, run_id: bytes, kind: Protection) -> control_pb2.Invitation:
    """Return an invitation that is in order, but for the key that `encrypted` needs."""
    [run] = federation.store.runs()
    plan = control_pb2.ArtifactReference(sha256=run.plan.sha256, size_bytes=run.plan.size_bytes)
    return control_pb2.Invitation(
        run_id=run_id,
        round=1,
        rounds=2,
        plan=plan,
        training=LocalTraining().to_message(),
        encoding=Encoding(kind).to_message(),
    )


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("run_id", b""), Reason.MALFORMED),
        (setting("run_id", bytes(300)), Reason.MALFORMED),
        (setting("round", 0), Reason.MALFORMED),
        (setting("round", 3), Reason.MALFORMED),
        (setting("plan.sha256", b""), Reason.MALFORMED),
        (setting("plan.sha256", bytes(32)), Reason.NOT_FOUND),
        (setting("plan.size_bytes", 1), Reason.PLAN_MISMATCH),
        (setting("attempt", 1 << 16), Reason.MALFORMED),
        (setting("plan.size_bytes", 1 << 40), Reason.MALFORMED),
        (setting("training.learning_rate", math.nan), Reason.MALFORMED),
        (setting("training.epochs", 0), Reason.MALFORMED),
        (setting("training.strategy", 0), Reason.MALFORMED),
        (setting("training.optimizer", 99), Reason.MALFORMED),
        (setting("encoding.protection", 0), Reason.MALFORMED),
        (setting("encoding.protection", 99), Reason.MALFORMED),
        (setting("encoding.capacity", 0), Reason.MALFORMED),
        (setting("encoding.clip", math.inf), Reason.MALFORMED),
        (setting("encoding.update_bits", 7), Reason.MALFORMED),
        (setting("encoding.protection", control_pb2.PROTECTION_ENCRYPTED), Reason.KEY_UNAVAILABLE),
        (setting("round", 2), Reason.STATE_DIVERGED),
        (history(), Reason.NOT_FOUND),
        (history(round=2), Reason.STATE_DIVERGED),
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
        control_pb2.KeyEnvelope(),
        control_pb2.KeyEnvelope(sender_id="victim", wrapped=bytes(64)),
        control_pb2.KeyEnvelope(sender_id="x" * 300, wrapped=bytes(64)),
    ],
)
async def test_a_run_key_that_does_not_open_is_declined(
    federation: Federation, victim: Agent, rogue: Rogue, envelope: control_pb2.KeyEnvelope
) -> None:
    for sender_key in (None, victim.identity.advertised_exchange_key()):
        message = invitation(federation, RUN, Protection.ENCRYPTED)
        message.envelope.CopyFrom(envelope)
        if sender_key is not None:
            message.envelope.sender_key.CopyFrom(sender_key)
        rogue.say(invitation=message)
        assert await rogue.hear_refusal() is Reason.KEY_UNAVAILABLE
        rogue.say(wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=1, envelope=message.envelope))
        assert await rogue.hear_refusal() is Reason.KEY_UNAVAILABLE
    await still_lives(federation, rogue)


@pytest.mark.parametrize("run_id", [b"", bytes(15), bytes(300)])
async def test_a_key_is_made_for_runs_with_a_name_only(
    federation: Federation, victim: Agent, rogue: Rogue, run_id: bytes
) -> None:
    recipient = control_pb2.KeyRecipient(
        agent_id=victim.name, exchange_key=victim.identity.advertised_exchange_key()
    )
    rogue.say(wrap_key=control_pb2.WrapKey(run_id=run_id, recipients=[recipient]))
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
        ({}, Reason.TOO_LARGE),  # what this coordinator answers to any upload
    ],
)
async def test_a_cohort_out_of_order_gets_no_update(
    federation: Federation, rogue: Rogue, fields: dict[str, Any], reason: Reason
) -> None:
    rogue.say(invitation=invitation(federation, RUN, Protection.PLAIN))
    await rogue.hear("ready")
    values: dict[str, Any] = {"round": 1, "attempt": 1, "members": ["victim"], "weight_cap": 32}
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
