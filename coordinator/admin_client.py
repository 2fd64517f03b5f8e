"""The operator's end of AdminService: requests as calls, answers as values, failures as one line.

FedloomError
└── Unreachable        no coordinator answered: `where`, `advice`
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.duration_pb2 import Duration

from coordinator import admin_messages as messages
from coordinator.progress import RunProgress, merged
from coordinator.run_state import Wish
from coordinator.summaries import (
    MAX_PAGE,
    AgentSummary,
    InvitationSummary,
    PlanSummary,
    PrivacyReport,
    RunSummary,
)
from fedloom.artifacts import ArtifactReference
from fedloom.channels import CLIENT_OPTIONS
from fedloom.errors import ConfigError, FedloomError, Reason, Refused, refused_from_rpc
from fedloom.v1 import admin_pb2, admin_pb2_grpc
from fedloom.version import ADMIN_VERSION

_METADATA = (("fedloom-admin-version", str(ADMIN_VERSION)),)
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_R = TypeVar("_R")


class Unreachable(FedloomError):
    """No coordinator answered."""

    def __init__(self, where: str, advice: str) -> None:
        super().__init__(f"{where}: no coordinator answers; {advice}")
        self.where = where
        self.advice = advice


@dataclass(frozen=True)
class NotStarted:
    """A run file that was refused, with every problem of it."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Joining:
    """What a token needs beside its secret."""

    enrolment_address: str
    authority_certificate: bytes  # DER
    invitation: InvitationSummary


class AdminClient:
    """One connection to a coordinator; raises Refused, ConfigError and Unreachable."""

    def __init__(
        self, channel: grpc.Channel, where: str, advice: str, is_private: bool = False
    ) -> None:
        self.is_private = is_private  # the service is this command's own: nobody serves the folder
        self._channel = channel
        self._stub = admin_pb2_grpc.AdminServiceStub(channel)
        self._where = where
        self._advice = advice

    @classmethod
    def local(cls, socket: Path, is_private: bool = False) -> "AdminClient":
        """Talk to the coordinator behind a unix socket."""
        credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
        channel = grpc.secure_channel(f"unix:{socket}", credentials, CLIENT_OPTIONS)
        return cls(channel, str(socket), "it has just stopped: try again", is_private)

    @classmethod
    def remote(cls, address: str, folder: Path) -> "AdminClient":
        """Talk to a coordinator elsewhere, with what `operator add` made."""
        try:
            authority, key, certificate = (
                (folder / name).read_bytes()
                for name in ("authority.pem", "operator.key", "operator.pem")
            )
        except OSError as error:
            raise ConfigError(
                str(folder), f"expected a folder made by `operator add`: {error.strerror}"
            ) from error
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return cls(
            grpc.secure_channel(address, credentials, CLIENT_OPTIONS),
            address,
            "check the address, that it serves, that `admin_listen` is in its coordinator.toml, "
            f"and that `operator list` there still names the owner of {folder}",
        )

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    # runs

    def start_run(
        self, run_id: bytes, run_file: str, file_name: str, folder: Path | None
    ) -> tuple[RunSummary, tuple[str, ...]] | NotStarted:
        """Queue a run and return it with warnings; a repeat with the same id starts nothing."""
        answer = self._call(
            self._stub.StartRun,
            admin_pb2.StartRunRequest(
                run_id=run_id,
                run_file=run_file,
                file_name=file_name,
                folder="" if folder is None else str(folder),
            ),
        )
        if answer.HasField("refused"):
            return NotStarted(tuple(answer.refused.problems), tuple(answer.warnings))
        return messages.read_run(answer.run), tuple(answer.warnings)

    def runs(self, id_prefix: str = "") -> Iterator[RunSummary]:
        """Yield runs, newest first, fetching pages as they are needed."""
        for answer in self._pages(
            self._stub.ListRuns, admin_pb2.ListRunsRequest, id_prefix=id_prefix
        ):
            yield from map(messages.read_run, answer.runs)

    def watch(self, run_id: bytes, follow: bool, agent_limit: int) -> Iterator[RunProgress]:
        """Yield the run's progress, each time as a whole."""
        request = admin_pb2.WatchRunRequest(run_id=run_id, follow=follow, agent_limit=agent_limit)
        known: RunProgress | None = None
        for answer in self._stream(self._stub.WatchRun, request):
            known = merged(known, messages.read_progress(answer))
            if not answer.more:
                yield known

    def wish(self, run_id: bytes, wish: Wish) -> RunSummary:
        """Ask for a run to go on, to wait or to end."""
        match wish:
            case Wish.PAUSE:
                paused = self._call(self._stub.PauseRun, admin_pb2.PauseRunRequest(run_id=run_id))
                return messages.read_run(paused.run)
            case Wish.RUN:
                resumed = self._call(
                    self._stub.ResumeRun, admin_pb2.ResumeRunRequest(run_id=run_id)
                )
                return messages.read_run(resumed.run)
            case Wish.CANCEL:
                cancelled = self._call(
                    self._stub.CancelRun, admin_pb2.CancelRunRequest(run_id=run_id)
                )
                return messages.read_run(cancelled.run)

    def privacy(self, run_id: bytes) -> PrivacyReport:
        """Ask who learns what from a run."""
        request = admin_pb2.GetRunPrivacyRequest(run_id=run_id)
        return messages.read_privacy(self._call(self._stub.GetRunPrivacy, request))

    def export(
        self, run_id: bytes, offset: int = 0
    ) -> Iterator[tuple[tuple[str, ArtifactReference], ...] | bytes]:
        """Yield the model's files, by name, and then their bytes from an offset over all."""
        request = admin_pb2.ExportRunRequest(run_id=run_id, offset=offset)
        for answer in self._stream(self._stub.ExportRun, request):
            if answer.WhichOneof("step") == "part":
                yield answer.part
            else:
                yield tuple(
                    (file.name, ArtifactReference(file.sha256, file.size_bytes))
                    for file in answer.manifest.files
                )

    # members

    def invite(
        self, secret_sha256: bytes, agent_id: str, lifetime_seconds: float, uses: int
    ) -> Joining:
        """Have an invitation remembered; a repeat with the same digest changes nothing."""
        lifetime = Duration()
        lifetime.FromMicroseconds(round(lifetime_seconds * 1e6))
        answer = self._call(
            self._stub.Invite,
            admin_pb2.InviteRequest(
                secret_sha256=secret_sha256, agent_id=agent_id, lifetime=lifetime, uses=uses
            ),
        )
        return Joining(
            answer.enrolment_address,
            answer.authority_certificate,
            messages.read_invitation(answer.invitation),
        )

    def invitations(self) -> Iterator[InvitationSummary]:
        """Yield invitations, those that expire last first."""
        for answer in self._pages(self._stub.ListInvitations, admin_pb2.ListInvitationsRequest):
            yield from map(messages.read_invitation, answer.invitations)

    def revoke_invitation(self, invitation_id: str) -> InvitationSummary:
        """Have an invitation made worthless."""
        request = admin_pb2.RevokeInvitationRequest(invitation_id=invitation_id)
        answer = self._call(self._stub.RevokeInvitation, request)
        return messages.read_invitation(answer.invitation)

    def agents(self) -> Iterator[AgentSummary]:
        """Yield enrolled agents by name."""
        for answer in self._pages(self._stub.ListAgents, admin_pb2.ListAgentsRequest):
            yield from map(messages.read_agent, answer.agents)

    def agent(self, agent_id: str) -> AgentSummary:
        """Ask for one agent."""
        request = admin_pb2.GetAgentRequest(agent_id=agent_id)
        return messages.read_agent(self._call(self._stub.GetAgent, request).agent)

    def ban(self, agent_id: str, reason: str) -> AgentSummary:
        """Have an agent kept out."""
        request = admin_pb2.BanAgentRequest(agent_id=agent_id, reason=reason)
        return messages.read_agent(self._call(self._stub.BanAgent, request).agent)

    def unban(self, agent_id: str) -> AgentSummary:
        """Have an agent let in again."""
        request = admin_pb2.UnbanAgentRequest(agent_id=agent_id)
        return messages.read_agent(self._call(self._stub.UnbanAgent, request).agent)

    # plans

    def plans(self) -> Iterator[PlanSummary]:
        """Yield plans, newest first."""
        for answer in self._pages(self._stub.ListPlans, admin_pb2.ListPlansRequest):
            yield from map(messages.read_plan, answer.plans)

    def plan(self, id_prefix: str) -> PlanSummary:
        """Have a plan verified."""
        request = admin_pb2.GetPlanRequest(id_prefix=id_prefix)
        return messages.read_plan(self._call(self._stub.GetPlan, request).plan)

    # calls

    def _call(self, rpc: Callable[..., _R], request: object) -> _R:
        try:
            return rpc(request, metadata=_METADATA)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _stream(self, rpc: Callable[..., Iterator[_R]], request: object) -> Iterator[_R]:
        try:
            yield from rpc(request, metadata=_METADATA)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _pages(self, rpc: Callable[..., Any], request: Any, **wanted: str) -> Iterator[Any]:
        token = ""
        while True:
            answer = self._call(rpc, request(page_size=MAX_PAGE, page_token=token, **wanted))
            yield answer
            if not (token := answer.next_page_token):
                return

    def _failure(self, error: grpc.RpcError) -> FedloomError:
        """Say what an RPC's end means to the operator."""
        call = cast("grpc.aio.AioRpcError", error)  # the same accessors, without a common base
        refused = refused_from_rpc(call)
        if refused is None and call.code() in _GONE:
            return Unreachable(self._where, self._advice)
        if refused is None and call.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Refused(
                Reason.PROTOCOL_UNSUPPORTED,
                "this coordinator does not know the request: use the same release of fedloom on "
                "both sides, and restart the coordinator after an upgrade",
            )
        if refused is None:
            return Refused(Reason.INTERNAL, f"{call.code().name}: {call.details()}")
        if refused.reason is Reason.MALFORMED:  # what the operator wrote
            where, _, problem = refused.subject.rpartition(": ")
            return ConfigError(where or "request", problem)
        return refused
