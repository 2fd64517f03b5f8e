"""What an operator is told, as it travels: each value to its message and back.

`*_message` is the coordinator's half, `read_*` the operator's. Both speak the same version of the
service, so a value of an enum that is not known here is refused, and not guessed at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import IntEnum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.progress import AgentProgress, OpenPhase, RoundProgress, RunProgress
from coordinator.run_state import Phase, Wish
from coordinator.summaries import (
    AgentSummary,
    InvitationSummary,
    PlanPart,
    PlanSummary,
    PrivacyReport,
    RunSummary,
    Stage,
)
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection, Release
from fedloom.v1 import admin_pb2, control_pb2, refusal_pb2

MAX_ROUNDS_PER_MESSAGE = 1_000
_V = TypeVar("_V")
_E = TypeVar("_E", bound=IntEnum)

PHASES = {
    Phase.GATHERING: admin_pb2.RUN_PHASE_GATHERING,
    Phase.TRAINING: admin_pb2.RUN_PHASE_TRAINING,
    Phase.COLLECTING: admin_pb2.RUN_PHASE_COLLECTING,
    Phase.SUMMING: admin_pb2.RUN_PHASE_SUMMING,
    Phase.APPLYING: admin_pb2.RUN_PHASE_APPLYING,
    Phase.RETURNING: admin_pb2.RUN_PHASE_RETURNING,
    Phase.COMPLETED: admin_pb2.RUN_PHASE_COMPLETED,
    Phase.FAILED: admin_pb2.RUN_PHASE_FAILED,
}
WISHES = {
    Wish.RUN: admin_pb2.RUN_WISH_RUN,
    Wish.PAUSE: admin_pb2.RUN_WISH_PAUSE,
    Wish.CANCEL: admin_pb2.RUN_WISH_CANCEL,
}
STAGES = {
    Stage.INVITED: admin_pb2.AGENT_STAGE_INVITED,
    Stage.TRAINING: admin_pb2.AGENT_STAGE_TRAINING,
    Stage.READY: admin_pb2.AGENT_STAGE_READY,
    Stage.UPLOADED: admin_pb2.AGENT_STAGE_UPLOADED,
    Stage.APPLIED: admin_pb2.AGENT_STAGE_APPLIED,
    Stage.DECLINED: admin_pb2.AGENT_STAGE_DECLINED,
}


def run_message(run: RunSummary) -> admin_pb2.Run:
    """Return the form that travels."""
    return admin_pb2.Run(
        run_id=run.run_id,
        name=utf8(run.name),
        phase=PHASES[run.phase],
        reason=_reason(run.reason),
        wish=WISHES[run.wish],
        round=run.round,
        completed=run.completed,
        rounds=run.rounds,
        agents=run.agents,
        created_at=_timestamp(run.created_at),
        plan_id=run.plan_id,
        protection=control_pb2.Protection.ValueType(run.protection or 0),
        release=control_pb2.Release.ValueType(run.release or 0),
        early_end=run.early_end,
    )


def read_run(message: admin_pb2.Run) -> RunSummary:
    """Return what a coordinator said of a run."""
    return RunSummary(
        message.run_id,
        message.name,
        _member(PHASES, message.phase),
        _read_reason(message.reason),
        _member(WISHES, message.wish),
        message.round,
        message.completed,
        message.rounds,
        message.agents,
        _seconds(message.created_at),
        message.plan_id,
        _enum(Protection, message.protection) if message.protection else None,
        _enum(Release, message.release) if message.release else None,
        message.early_end,
    )


def agent_message(agent: AgentSummary) -> admin_pb2.Agent:
    """Return the form that travels."""
    return admin_pb2.Agent(
        agent_id=agent.agent_id,
        enrolled_at=_timestamp(agent.enrolled_at),
        certificate_until=_maybe_timestamp(agent.certificate_until),
        last_seen=_maybe_timestamp(agent.last_seen),
        connected=agent.connected,
        banned_at=_maybe_timestamp(agent.banned_at),
        ban_reason=utf8(agent.ban_reason),
    )


def read_agent(message: admin_pb2.Agent) -> AgentSummary:
    """Return what a coordinator said of an agent."""
    times = {
        name: _seconds(getattr(message, name)) if message.HasField(name) else None
        for name in ("certificate_until", "last_seen", "banned_at")
    }
    return AgentSummary(
        message.agent_id,
        _seconds(message.enrolled_at),
        connected=message.connected,
        ban_reason=message.ban_reason,
        **times,
    )


def invitation_message(invitation: InvitationSummary) -> admin_pb2.IssuedInvitation:
    """Return the form that travels."""
    return admin_pb2.IssuedInvitation(
        invitation_id=invitation.invitation_id,
        agent_id=invitation.agent_id,
        expires_at=_timestamp(invitation.expires_at),
        uses=invitation.uses,
        used=invitation.used,
        revoked_at=_maybe_timestamp(invitation.revoked_at),
    )


def read_invitation(message: admin_pb2.IssuedInvitation) -> InvitationSummary:
    """Return what a coordinator said of an invitation."""
    return InvitationSummary(
        message.invitation_id,
        message.agent_id,
        _seconds(message.expires_at),
        message.uses,
        message.used,
        _seconds(message.revoked_at) if message.HasField("revoked_at") else None,
    )


def plan_message(plan: PlanSummary) -> admin_pb2.PlanSummary:
    """Return the form that travels."""
    return admin_pb2.PlanSummary(
        plan_id=plan.plan_id,
        name=utf8(plan.name),
        base_model=utf8(plan.base_model),
        parameter_count=plan.parameters,
        labels=plan.labels,
        max_tokens=plan.max_tokens,
        files=[admin_pb2.PlanFile(name=name, size_bytes=size) for name, size in plan.files],
        runs=plan.runs,
        damage=utf8(plan.damage),
        task=utf8(plan.task),
        parts=[
            admin_pb2.PlanPart(role=utf8(p.role), tensors=p.tensors, parameter_count=p.parameters)
            for p in plan.parts
        ],
    )


def read_plan(message: admin_pb2.PlanSummary) -> PlanSummary:
    """Return what a coordinator said of a plan."""
    return PlanSummary(
        message.plan_id,
        message.name,
        message.base_model,
        message.parameter_count,
        message.labels,
        message.max_tokens,
        tuple((file.name, file.size_bytes) for file in message.files),
        message.runs,
        message.damage,
        message.task,
        tuple(PlanPart(p.role, p.tensors, p.parameter_count) for p in message.parts),
    )


def privacy_message(report: PrivacyReport) -> admin_pb2.GetRunPrivacyResponse:
    """Return the form that travels."""
    return admin_pb2.GetRunPrivacyResponse(
        run=run_message(report.run),
        lines=[admin_pb2.PrivacyLine(party=party, learns=what) for party, what in report.lines],
        coordinator_reads=report.coordinator_reads,
        minimum=report.minimum,
        authority_is_offline=report.authority_is_offline,
    )


def read_privacy(message: admin_pb2.GetRunPrivacyResponse) -> PrivacyReport:
    """Return what a coordinator said of a run's privacy."""
    return PrivacyReport(
        read_run(message.run),
        message.minimum,
        message.authority_is_offline,
        tuple((line.party, line.learns) for line in message.lines),
        message.coordinator_reads,
    )


def progress_messages(
    progress: RunProgress, before: RunProgress | None = None
) -> Iterator[admin_pb2.WatchRunResponse]:
    """Yield what changed since `before`, in messages of bounded size."""
    known = frozenset() if before is None else frozenset(before.history)
    rounds = [entry for entry in progress.history if entry not in known]
    while len(rounds) > MAX_ROUNDS_PER_MESSAGE:
        cut, rounds = rounds[:MAX_ROUNDS_PER_MESSAGE], rounds[MAX_ROUNDS_PER_MESSAGE:]
        yield _progress(replace(progress, history=tuple(cut)), more=True)
    yield _progress(replace(progress, history=tuple(rounds)), more=False)


def read_progress(message: admin_pb2.WatchRunResponse) -> RunProgress:
    """Return what a coordinator said, with those rounds only that changed."""
    return RunProgress(
        read_run(message.run),
        message.coordinator_reads,
        _read_open_phase(message.open_phase) if message.HasField("open_phase") else None,
        tuple(_read_round(entry) for entry in message.rounds),
        tuple(_read_agent_progress(agent) for agent in message.agents),
        {_member(STAGES, found.stage): found.agents for found in message.stages},
    )


def _progress(progress: RunProgress, more: bool) -> admin_pb2.WatchRunResponse:
    phase = progress.open_phase
    return admin_pb2.WatchRunResponse(
        run=run_message(progress.run),
        open_phase=None if phase is None else _open_phase(phase),
        rounds=[_round(entry) for entry in progress.history],
        agents=[_agent_progress(agent) for agent in progress.agents],
        stages=[
            admin_pb2.StageCount(stage=STAGES[stage], agents=count)
            for stage, count in progress.stages.items()
        ],
        coordinator_reads=progress.coordinator_reads,
        more=more,
    )


def _open_phase(phase: OpenPhase) -> admin_pb2.OpenPhase:
    return admin_pb2.OpenPhase(
        done=phase.done,
        expected=phase.expected,
        deadline=_maybe_timestamp(phase.deadline),
        behind_run_id=phase.behind or b"",
        connected=phase.connected,
    )


def _read_open_phase(message: admin_pb2.OpenPhase) -> OpenPhase:
    return OpenPhase(
        message.done,
        message.expected,
        _seconds(message.deadline) if message.HasField("deadline") else None,
        message.behind_run_id or None,
        message.connected,
    )


def _round(entry: RoundProgress) -> admin_pb2.RoundProgress:
    return admin_pb2.RoundProgress(
        round=entry.round,
        duration=None if entry.seconds is None else _duration(entry.seconds),
        agents=entry.agents,
        training_loss=entry.training_loss,
        evaluated=entry.evaluated,
        correct=entry.correct,
        summed=entry.summed,
        saturated=entry.saturated,
        saturated_share=entry.saturated_share,
        sent_bytes=entry.sent_bytes,
        senders=entry.senders,
        received_bytes=entry.received_bytes,
        receivers=entry.receivers,
        quality=[admin_pb2.NamedMetric(name=name, value=value) for name, value in entry.quality],
    )


def _read_round(message: admin_pb2.RoundProgress) -> RoundProgress:
    return RoundProgress(
        message.round,
        _span(message.duration) if message.HasField("duration") else None,
        message.agents,
        message.training_loss if message.HasField("training_loss") else None,
        message.evaluated,
        message.correct,
        message.summed,
        message.saturated,
        message.saturated_share if message.HasField("saturated_share") else None,
        message.sent_bytes,
        message.senders,
        message.received_bytes,
        message.receivers,
        tuple((metric.name, metric.value) for metric in message.quality),
    )


def _agent_progress(agent: AgentProgress) -> admin_pb2.AgentProgress:
    return admin_pb2.AgentProgress(
        agent_id=agent.agent,
        stage=STAGES[agent.stage],
        progress=agent.progress,
        training_loss=agent.training_loss,
        evaluated=agent.evaluated,
        correct=agent.correct,
        sent_bytes=agent.sent_bytes,
        received_bytes=agent.received_bytes,
        refusal=_reason(agent.refusal),
    )


def _read_agent_progress(message: admin_pb2.AgentProgress) -> AgentProgress:
    return AgentProgress(
        message.agent_id,
        _member(STAGES, message.stage),
        message.progress,
        message.training_loss if message.HasField("training_loss") else None,
        message.evaluated,
        message.correct,
        message.sent_bytes if message.HasField("sent_bytes") else None,
        message.received_bytes if message.HasField("received_bytes") else None,
        _read_reason(message.refusal),
    )


def _member(table: Mapping[_V, int], value: int) -> _V:
    for member, number in table.items():
        if number == value:
            return member
    raise Refused(Reason.PROTOCOL_UNSUPPORTED, f"expected {list(table)}, found {value}")


def _enum(kind: type[_E], value: int) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise Refused(
            Reason.PROTOCOL_UNSUPPORTED, f"expected a {kind.__name__}, found {value}"
        ) from None


def _reason(reason: Reason | None) -> refusal_pb2.Reason.ValueType:
    return refusal_pb2.Reason.ValueType(reason or 0)


def _read_reason(value: int) -> Reason | None:
    return _enum(Reason, value) if value else None


def utf8(text: str) -> str:
    """A file's name may hold bytes that are no UTF-8 (lone surrogates in Python): they become ?."""
    return text.encode(errors="replace").decode()


def _timestamp(seconds: float) -> Timestamp:
    found = Timestamp()
    found.FromMicroseconds(round(seconds * 1e6))
    return found


def _maybe_timestamp(seconds: float | None) -> Timestamp | None:
    return None if seconds is None else _timestamp(seconds)


def _seconds(timestamp: Timestamp) -> float:
    return timestamp.ToMicroseconds() / 1e6


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromMicroseconds(round(seconds * 1e6))
    return found


def _span(duration: Duration) -> float:
    return duration.ToMicroseconds() / 1e6
