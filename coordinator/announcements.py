"""What agents are told, as messages: the only place where a run's state becomes protobuf."""

from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration

from coordinator.config import RunConfig
from coordinator.masking import Masking
from coordinator.run_state import Phase, RunState
from coordinator.store import RoundRecord
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused, refusal_details
from fedloom.v1 import control_pb2

Message = control_pb2.ConnectResponse


def wrap_key(
    run_id: bytes,
    key_id: int,
    recipients: Mapping[str, control_pb2.ExchangeKey],
    envelope: bytes | None,
) -> Message:
    """Ask an agent to wrap a run key; without an envelope it makes the key."""
    request = control_pb2.WrapKey(
        run_id=run_id,
        key_id=key_id,
        recipients=[
            control_pb2.KeyRecipient(agent_id=agent, exchange_key=key)
            for agent, key in sorted(recipients.items())
        ],
    )
    if envelope is not None:
        request.envelope.ParseFromString(envelope)
    return Message(wrap_key=request)


def invitation(
    run_id: bytes,
    config: RunConfig,
    plan: ArtifactReference,
    state: RunState,
    history: Iterable[RoundRecord],
    envelopes: Iterable[bytes],
    seconds_left: float,
) -> Message:
    """Invite an agent to the state's round."""
    message = control_pb2.Invitation(
        run_id=run_id,
        round=state.round,
        rounds=config.rounds,
        plan=_reference(plan),
        training=config.training.to_message(),
        encoding=config.encoding.to_message(),
        history=[_outcome(record) for record in history],
        deadline=_duration(seconds_left),
        attempt=state.attempt + 1,
        envelopes=[control_pb2.KeyEnvelope.FromString(envelope) for envelope in envelopes],
        previous_round=state.previous_round,
        release=control_pb2.Release.ValueType(config.release),
        minimum=config.cohort.minimum,
        gate=config.gate.to_message(),
        evaluation=config.evaluation.to_message(),
    )
    return Message(invitation=message)


def cohort(
    run_id: bytes, state: RunState, clip: float, seconds_left: float, masking: Masking | None
) -> Message:
    """Tell who takes part, and under masks with which keys."""
    return Message(
        cohort=control_pb2.Cohort(
            run_id=run_id,
            round=state.round,
            attempt=state.attempt,
            members=state.cohort,
            weight_cap=state.weight_cap,
            deadline=_duration(seconds_left),
            mask_cohort=b"" if masking is None else masking.encoded_cohort,
            identities=() if masking is None else masking.identities,
            clip=clip,
        )
    )


def mask_step(run_id: bytes, round_number: int, message: bytes) -> Message:
    """Carry a message of the cohort's protocol for masks."""
    step = control_pb2.MaskStep(run_id=run_id, round=round_number, message=message)
    return Message(mask_step=step)


def accepted(run_id: bytes, state: RunState, slots: Sequence[int]) -> Message:
    """Tell which updates are in the sum."""
    return Message(
        accepted=control_pb2.Accepted(
            run_id=run_id,
            round=state.round,
            attempt=state.attempt,
            updates=[
                control_pb2.AcceptedUpdate(slot=slot, sha256=state.uploaded[state.cohort[slot]])
                for slot in slots
            ],
        )
    )


def result(run_id: bytes, record: RoundRecord) -> Message:
    """Tell where the sum is."""
    return Message(result=control_pb2.Result(run_id=run_id, outcome=_outcome(record)))


def return_sum(run_id: bytes, round_number: int) -> Message:
    """Ask for the opened sum of a round."""
    return Message(return_sum=control_pb2.ReturnSum(run_id=run_id, round=round_number))


def waiting(
    cause: control_pb2.WaitCause.ValueType,
    run_id: bytes = b"",
    round_number: int = 0,
    come_back_seconds: int = 0,
    spread_seconds: int = 0,
) -> Message:
    """Tell why nothing is asked of an agent, and when to come back."""
    return Message(
        waiting=control_pb2.Waiting(
            run_id=run_id,
            round=round_number,
            cause=cause,
            come_back_seconds=come_back_seconds,
            spread_seconds=spread_seconds,
        )
    )


def finished(
    run_id: bytes,
    phase: Phase,
    reason: Reason | None,
    history: Iterable[RoundRecord],
    envelopes: Iterable[bytes],
) -> Message:
    """Tell how the run ended, and what an agent needs that missed a part of it."""
    completed = phase is Phase.COMPLETED
    message = control_pb2.Finished(
        run_id=run_id,
        outcome=(
            control_pb2.RUN_OUTCOME_COMPLETED if completed else control_pb2.RUN_OUTCOME_FAILED
        ),
        history=[_outcome(record) for record in history],
        envelopes=[control_pb2.KeyEnvelope.FromString(envelope) for envelope in envelopes],
    )
    if reason is not None:
        message.reason.CopyFrom(refusal_details(Refused(reason, "the run failed")))
    return Message(finished=message)


def refusal(run_id: bytes, round_number: int, refused: Refused) -> Message:
    """Refuse one step and keep the stream."""
    return Message(
        refusal=control_pb2.StepRefusal(
            run_id=run_id, round=round_number, details=refusal_details(refused)
        )
    )


def _outcome(record: RoundRecord) -> control_pb2.RoundOutcome:
    return control_pb2.RoundOutcome(
        round=record.round,
        attempt=record.attempt,
        weight_cap=record.weight_cap,
        slots=record.slots,
        sum=_reference(record.sum),
        cohort_digest=record.cohort_digest,
        previous_round=record.previous_round,
        key_id=record.key_id,
    )


def _reference(artifact: ArtifactReference) -> control_pb2.ArtifactReference:
    return control_pb2.ArtifactReference(sha256=artifact.sha256, size_bytes=artifact.size_bytes)


def _duration(seconds: float) -> Duration:
    return Duration(seconds=max(0, int(seconds)))
