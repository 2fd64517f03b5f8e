"""The control stream against peers that break its order, its ranges and its rounds."""

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator.run_state import Phase
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from fedloom.version import OLDEST_SERVED_PROTOCOL, PROTOCOL_VERSION
from tests.integration.federation import Agent, Federation, until
from tests.integration.raw import RawControl, raw_channel, refused

RUN = bytes(range(16))
DIGEST = bytes(32)


@pytest.fixture
async def peer(federation: Federation) -> Agent:
    """Return an enrolled agent that no session of the product runs for."""
    return await federation.enrol("peer")


@pytest.fixture
async def control(peer: Agent) -> AsyncIterator[RawControl]:
    """Return a control stream of that agent, before its hello."""
    async with raw_channel(peer.identity) as channel:
        yield RawControl(channel)


@pytest.fixture
async def admitted(peer: Agent, control: RawControl) -> RawControl:
    """Return the stream after the welcome."""
    await control.hello(peer.identity)
    return control


async def test_the_first_message_is_a_hello(control: RawControl) -> None:
    await control.send(heartbeat=control_pb2.Heartbeat())
    async with refused(Reason.MALFORMED, "hello first, found heartbeat"):
        await control.ended()


async def test_silence_and_an_early_end_are_no_hello(
    control: RawControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.services.control.HELLO_SECONDS", 0.1)
    async with refused(Reason.MALFORMED, "a hello within"):
        await control.ended()


async def test_an_empty_stream_is_no_hello(control: RawControl) -> None:
    await control.call.done_writing()
    async with refused(Reason.MALFORMED, "hello"):
        await control.ended()


async def test_there_is_one_hello(admitted: RawControl) -> None:
    await admitted.send(hello=control_pb2.Hello(protocol_version=PROTOCOL_VERSION))
    async with refused(Reason.MALFORMED, "one hello"):
        await admitted.ended()


@pytest.mark.parametrize("version", [0, 999])
async def test_a_protocol_out_of_range_is_told_the_range(
    peer: Agent, control: RawControl, version: int
) -> None:
    served = f"{OLDEST_SERVED_PROTOCOL}..{PROTOCOL_VERSION}"
    async with refused(Reason.PROTOCOL_UNSUPPORTED, f"{served}, found {version}"):
        await control.send(hello=control_pb2.Hello(protocol_version=version))
        await control.ended()


@pytest.mark.parametrize(
    "key",
    [
        control_pb2.ExchangeKey(),
        control_pb2.ExchangeKey(public_key=bytes(31)),
        control_pb2.ExchangeKey(public_key=bytes(32), signature=bytes(5000)),
        control_pb2.ExchangeKey(public_key=bytes(32), certificate=bytes(5000)),
    ],
)
async def test_an_exchange_key_has_its_sizes(
    control: RawControl, key: control_pb2.ExchangeKey
) -> None:
    await control.send(hello=control_pb2.Hello(protocol_version=PROTOCOL_VERSION, exchange_key=key))
    async with refused(Reason.MALFORMED, "X25519"):
        await control.ended()


def ready(**fields: Any) -> dict[str, Any]:
    """Return a READY of an unknown run."""
    values: dict[str, Any] = {"run_id": RUN, "round": 1} | fields
    return {"ready": control_pb2.Ready(**values)}


def applied(**fields: Any) -> dict[str, Any]:
    """Return an APPLIED of an unknown run."""
    values: dict[str, Any] = {"run_id": RUN, "round": 1, "state_sha256": DIGEST} | fields
    return {"applied": control_pb2.Applied(**values)}


@pytest.mark.parametrize(
    "step",
    [
        ready(training_loss=math.nan),
        ready(training_loss=math.inf),
        ready(weight_class=99),
        applied(state_sha256=b""),
        applied(state_sha256=bytes(33)),
        applied(evaluation=control_pb2.Evaluation(count=0)),
        applied(evaluation=control_pb2.Evaluation(count=1, correct=2)),
        applied(evaluation=control_pb2.Evaluation(count=1, loss=math.nan)),
        applied(saturated=1 << 63),
        {"heartbeat": control_pb2.Heartbeat(progress=math.nan)},
        {"heartbeat": control_pb2.Heartbeat(progress=1.5)},
        {
            "wrapped_key": control_pb2.WrappedKey(
                run_id=RUN, envelopes=[control_pb2.KeyEnvelope(wrapped=bytes(20_000))]
            )
        },
    ],
    ids=lambda step: str(step).replace("\n", " ")[:60],
)
async def test_a_value_out_of_range_ends_the_stream(
    admitted: RawControl, step: dict[str, Any]
) -> None:
    await admitted.send(**step)
    async with refused(Reason.MALFORMED):
        await admitted.ended()


@pytest.mark.parametrize("run_id", [b"", bytes(15), RUN])
async def test_steps_of_an_unknown_run_change_nothing(
    federation: Federation, peer: Agent, admitted: RawControl, run_id: bytes
) -> None:
    await admitted.send(**ready(run_id=run_id))
    await admitted.send(**applied(run_id=run_id))
    await admitted.send(wrapped_key=control_pb2.WrappedKey(run_id=run_id))
    await admitted.send(refusal=control_pb2.StepRefusal(run_id=run_id))
    await admitted.send(heartbeat=control_pb2.Heartbeat(run_id=run_id, round=3, progress=0.5))
    # The stream still lives, and the next run begins as if nothing had been said.
    federation.start_run("plain", rounds=1, minimum=1)
    assert (await admitted.receive("invitation")).invitation.round == 1


async def test_an_unknown_step_of_a_newer_agent_is_ignored(
    federation: Federation, admitted: RawControl
) -> None:
    unknown = control_pb2.ConnectRequest.FromString(bytes([0xFA, 0x01, 0x00]))  # field 31
    await admitted.call.write(unknown)
    federation.start_run("plain", rounds=1, minimum=1)
    await admitted.receive("invitation")


async def test_steps_of_a_wrong_round_are_refused_and_change_nothing(
    federation: Federation, admitted: RawControl
) -> None:
    run_id = federation.start_run("plain", rounds=2, minimum=1)
    await admitted.receive("invitation")
    wrong = (
        ready(run_id=run_id, round=2),
        ready(run_id=run_id, round=0),
        applied(run_id=run_id, round=1),
        {"refusal": control_pb2.StepRefusal(run_id=run_id, round=2)},
    )
    for step in wrong:
        await admitted.send(**step)
        refusal = (await admitted.receive("refusal")).refusal
        assert refusal.run_id == run_id
        assert Reason(refusal.details.reason) is Reason.WRONG_ROUND
    assert federation.run(run_id).phase is Phase.TRAINING
    await admitted.send(**ready(run_id=run_id, round=1))
    await admitted.receive("cohort")


async def test_only_the_asked_agent_hands_out_run_keys(
    federation: Federation, peer: Agent, admitted: RawControl
) -> None:
    maker = await federation.enrol("a-maker")
    maker.engine.may_finish.clear()
    maker.start()
    run_id = federation.start_run("encrypted", rounds=1, minimum=2)
    await admitted.send(
        wrapped_key=control_pb2.WrappedKey(
            run_id=run_id,
            key_id=1,
            envelopes=[control_pb2.KeyEnvelope(recipient_id=maker.name, wrapped=b"mine")],
        )
    )
    invitation = (await admitted.receive("invitation")).invitation
    assert invitation.envelopes[-1].sender_id == maker.name
    envelopes = federation.store.envelopes(run_id)[1]
    assert sorted(envelopes) == ["a-maker", "peer"]
    assert b"mine" not in b"".join(envelopes.values())


async def test_a_newer_stream_of_the_same_agent_takes_over(
    federation: Federation, peer: Agent, admitted: RawControl
) -> None:
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    await admitted.receive("invitation")
    async with raw_channel(peer.identity) as channel:
        newer = RawControl(channel)
        await newer.hello(peer.identity)
        assert (await newer.receive("invitation")).invitation.run_id == run_id
        async with refused(Reason.SUPERSEDED):
            await admitted.ended()
        await newer.send(**ready(run_id=run_id))
        await newer.receive("cohort")


async def test_an_agent_that_is_started_twice_stops_the_older_process(
    federation: Federation, peer: Agent
) -> None:
    twin = Agent(peer.home, peer.identity, peer.engine)
    federation.agents.append(twin)
    peer.engine.may_finish.clear()
    peer.start()
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    await until("the first to train", peer.engine.training.is_set)
    twin.start()
    error = await peer.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.SUPERSEDED
    peer.engine.may_finish.set()
    assert (await twin.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
