"""AdminService: an operator's requests, checked, handed to `operations`, answered.

Its handlers run on threads, not on the event loop: they hash plans, repeat a run's sums, wait for
the store, and no agent shall wait for that.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import structlog

from coordinator import admin_messages as messages
from coordinator.audit import Action, AuditLog, Fact
from coordinator.faults import StorageFault, is_full
from coordinator.operations import Operations
from coordinator.run_checks import RunFile
from coordinator.run_state import Wish
from coordinator.services.access import REQUIRED_ROLE, Role
from fedloom.errors import RULES, ConfigError, Reason, Refused, refusal_trailers
from fedloom.v1 import admin_pb2, admin_pb2_grpc
from fedloom.version import ADMIN_VERSION

VERSION_KEY = "fedloom-admin-version"
MAX_FILE_NAME = 255
POLL_SECONDS = 0.5
_log = structlog.get_logger()

Context = grpc.ServicerContext
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Identify = Callable[[Context], str]  # returns who calls; raises Refused(NOT_PERMITTED)


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Messages in, messages out; what changes anything is recorded."""

    def __init__(self, operations: Operations, identify: Identify, audit: AuditLog) -> None:
        self._operations = operations
        self._identify = identify
        self._audit = audit

    def _done(self, context: Context, action: Action, subject: str, **facts: Fact) -> None:
        self._audit.append(self._identify(context), action, subject, **facts)

    # runs

    def StartRun(  # noqa: N802 - gRPC's name
        self, request: admin_pb2.StartRunRequest, context: Context
    ) -> admin_pb2.StartRunResponse:
        """Check a run file and queue its run."""
        name = Path(request.file_name).name
        if name in ("", "..") or len(name.encode()) > MAX_FILE_NAME:
            raise Refused(Reason.MALFORMED, "expected the name of a file")
        folder = Path(request.folder) if request.folder else None
        if folder is not None and not folder.is_absolute():
            raise Refused(Reason.MALFORMED, "expected an absolute path of the file's folder")
        started = self._operations.start_run(
            request.run_id, RunFile(request.run_file, name, folder)
        )
        if started.run is not None:
            self._done(context, Action.RUN_STARTED, started.run.run_id.hex())
            return admin_pb2.StartRunResponse(
                run=messages.run_message(started.run), warnings=started.warnings
            )
        refused = admin_pb2.RunProblems(problems=map(messages.utf8, started.problems))
        return admin_pb2.StartRunResponse(
            refused=refused, warnings=map(messages.utf8, started.warnings)
        )

    def ListRuns(  # noqa: N802
        self, request: admin_pb2.ListRunsRequest, context: Context
    ) -> admin_pb2.ListRunsResponse:
        """List runs."""
        found = self._operations.runs(request.id_prefix, request.page_size, request.page_token)
        return admin_pb2.ListRunsResponse(
            runs=map(messages.run_message, found.items), next_page_token=found.next_token
        )

    def WatchRun(  # noqa: N802
        self, request: admin_pb2.WatchRunRequest, context: Context
    ) -> Iterator[admin_pb2.WatchRunResponse]:
        """Send the run's progress, and then what changes of it."""
        read = self._operations.watch(request.run_id, min(request.agent_limit, 1_000))
        ended = threading.Event()
        context.add_callback(ended.set)  # a watcher that left shall not hold its thread
        told = None
        while not ended.is_set():
            progress = read()
            if progress != told:
                yield from messages.progress_messages(progress, told)
                told = progress
            if not request.follow or progress.run.phase.over:
                return
            ended.wait(POLL_SECONDS)

    def PauseRun(  # noqa: N802
        self, request: admin_pb2.PauseRunRequest, context: Context
    ) -> admin_pb2.PauseRunResponse:
        """Ask for a pause."""
        run = self._operations.wish(request.run_id, Wish.PAUSE)
        self._done(context, Action.RUN_PAUSED, run.run_id.hex())
        return admin_pb2.PauseRunResponse(run=messages.run_message(run))

    def ResumeRun(  # noqa: N802
        self, request: admin_pb2.ResumeRunRequest, context: Context
    ) -> admin_pb2.ResumeRunResponse:
        """Let a run go on."""
        run = self._operations.wish(request.run_id, Wish.RUN)
        self._done(context, Action.RUN_RESUMED, run.run_id.hex())
        return admin_pb2.ResumeRunResponse(run=messages.run_message(run))

    def CancelRun(  # noqa: N802
        self, request: admin_pb2.CancelRunRequest, context: Context
    ) -> admin_pb2.CancelRunResponse:
        """End a run."""
        run = self._operations.wish(request.run_id, Wish.CANCEL)
        self._done(context, Action.RUN_CANCELLED, run.run_id.hex())
        return admin_pb2.CancelRunResponse(run=messages.run_message(run))

    def GetRunPrivacy(  # noqa: N802
        self, request: admin_pb2.GetRunPrivacyRequest, context: Context
    ) -> admin_pb2.GetRunPrivacyResponse:
        """Say who learns what."""
        return messages.privacy_message(self._operations.privacy(request.run_id))

    def ExportRun(  # noqa: N802
        self, request: admin_pb2.ExportRunRequest, context: Context
    ) -> Iterator[admin_pb2.ExportRunResponse]:
        """Send the model's files, one after another."""
        model = self._operations.model(request.run_id)
        size = sum(file.reference.size_bytes for file in model.files)
        if request.offset > size:
            raise Refused(Reason.MALFORMED, f"expected an offset of at most {size}")
        files = [
            admin_pb2.ExportedFile(
                name=file.name,
                size_bytes=file.reference.size_bytes,
                sha256=file.reference.sha256,
            )
            for file in model.files
        ]
        self._done(context, Action.MODEL_EXPORTED, request.run_id.hex())
        manifest = admin_pb2.ExportManifest(files=files, rounds=model.rounds)
        yield admin_pb2.ExportRunResponse(manifest=manifest)
        for part in model.parts(request.offset):
            yield admin_pb2.ExportRunResponse(part=part)

    # members

    def Invite(  # noqa: N802
        self, request: admin_pb2.InviteRequest, context: Context
    ) -> admin_pb2.InviteResponse:
        """Remember an invitation."""
        members = self._operations.members
        lifetime = request.lifetime.ToTimedelta().total_seconds()
        found = members.invite(request.secret_sha256, request.agent_id, lifetime, request.uses)
        self._done(context, Action.AGENT_INVITED, found.agent_id, uses=found.uses)
        return admin_pb2.InviteResponse(
            enrolment_address=members.enrolment_address,
            authority_certificate=members.authority_certificate,
            invitation=messages.invitation_message(found),
        )

    def ListInvitations(  # noqa: N802
        self, request: admin_pb2.ListInvitationsRequest, context: Context
    ) -> admin_pb2.ListInvitationsResponse:
        """List invitations."""
        found = self._operations.members.invitations(request.page_size, request.page_token)
        return admin_pb2.ListInvitationsResponse(
            invitations=map(messages.invitation_message, found.items),
            next_page_token=found.next_token,
        )

    def RevokeInvitation(  # noqa: N802
        self, request: admin_pb2.RevokeInvitationRequest, context: Context
    ) -> admin_pb2.RevokeInvitationResponse:
        """Make an invitation worthless."""
        found = self._operations.members.revoke_invitation(request.invitation_id)
        self._done(context, Action.INVITATION_REVOKED, found.invitation_id)
        return admin_pb2.RevokeInvitationResponse(invitation=messages.invitation_message(found))

    def ListAgents(  # noqa: N802
        self, request: admin_pb2.ListAgentsRequest, context: Context
    ) -> admin_pb2.ListAgentsResponse:
        """List agents."""
        found = self._operations.members.agents(request.page_size, request.page_token)
        return admin_pb2.ListAgentsResponse(
            agents=map(messages.agent_message, found.items), next_page_token=found.next_token
        )

    def GetAgent(  # noqa: N802
        self, request: admin_pb2.GetAgentRequest, context: Context
    ) -> admin_pb2.GetAgentResponse:
        """Tell what is known of an agent."""
        found = self._operations.members.agent(request.agent_id)
        return admin_pb2.GetAgentResponse(agent=messages.agent_message(found))

    def BanAgent(  # noqa: N802
        self, request: admin_pb2.BanAgentRequest, context: Context
    ) -> admin_pb2.BanAgentResponse:
        """Keep an agent out."""
        found = self._operations.members.ban(request.agent_id, request.reason)
        self._done(context, Action.AGENT_BANNED, found.agent_id, reason=found.ban_reason)
        return admin_pb2.BanAgentResponse(agent=messages.agent_message(found))

    def UnbanAgent(  # noqa: N802
        self, request: admin_pb2.UnbanAgentRequest, context: Context
    ) -> admin_pb2.UnbanAgentResponse:
        """Let an agent in again."""
        found = self._operations.members.unban(request.agent_id)
        self._done(context, Action.AGENT_UNBANNED, found.agent_id)
        return admin_pb2.UnbanAgentResponse(agent=messages.agent_message(found))

    # plans

    def ListPlans(  # noqa: N802
        self, request: admin_pb2.ListPlansRequest, context: Context
    ) -> admin_pb2.ListPlansResponse:
        """List plans."""
        found = self._operations.plans.list(request.page_size, request.page_token)
        return admin_pb2.ListPlansResponse(
            plans=map(messages.plan_message, found.items), next_page_token=found.next_token
        )

    def GetPlan(  # noqa: N802
        self, request: admin_pb2.GetPlanRequest, context: Context
    ) -> admin_pb2.GetPlanResponse:
        """Verify a plan and tell what is in it."""
        found = self._operations.plans.verified(request.id_prefix)
        return admin_pb2.GetPlanResponse(plan=messages.plan_message(found))


class Reception(grpc.ServerInterceptor):
    """Lets operators in, and ends an RPC with the refusal that its handler raises."""

    def __init__(self, identify: Identify) -> None:
        self._identify = identify

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Handler | None]",
        details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Wrap the handler of every RPC that the table gives to operators; there are no others."""
        handler = continuation(details)
        if handler is None or REQUIRED_ROLE.get(details.method) is not Role.OPERATOR:
            return None  # UNIMPLEMENTED
        rpc = details.method.rpartition("/")[2]
        formats = (handler.request_deserializer, handler.response_serializer)
        if (stream := handler.unary_stream) is not None:
            return grpc.unary_stream_rpc_method_handler(self._streamed(rpc, stream), *formats)
        if (answer := handler.unary_unary) is not None:
            return grpc.unary_unary_rpc_method_handler(self._answered(rpc, answer), *formats)
        raise AssertionError(f"no operator streams requests: {rpc}")

    def _answered(self, rpc: str, handle: Callable[[Any, Context], Any]) -> Callable[..., Any]:
        def answered(request: Any, context: Context) -> Any:
            with _refusing(context, rpc):
                self._admit(context, rpc)
                return handle(request, context)

        return answered

    def _streamed(
        self, rpc: str, handle: Callable[[Any, Context], Iterator[Any]]
    ) -> Callable[..., Iterator[Any]]:
        def streamed(request: Any, context: Context) -> Iterator[Any]:
            with _refusing(context, rpc):
                self._admit(context, rpc)
                yield from handle(request, context)

        return streamed

    def _admit(self, context: Context, rpc: str) -> None:
        self._identify(context)
        spoken = next((str(v) for k, v in context.invocation_metadata() if k == VERSION_KEY), "")
        if spoken != str(ADMIN_VERSION):
            raise Refused(
                Reason.PROTOCOL_UNSUPPORTED,
                f"this coordinator speaks version {ADMIN_VERSION} of the admin service, the "
                f"command {spoken or 'none'}: use the same release of fedloom on both sides",
            )


@contextmanager
def _refusing(context: Context, rpc: str) -> Iterator[None]:
    """End the RPC with what the body raises; a fault of ours tells no details."""
    try:
        yield
    except Refused as refused:
        ending = refused
    except ConfigError as error:
        ending = Refused(Reason.MALFORMED, str(error))
    except StorageFault as fault:
        _log.error("storage failed", rpc=rpc, problem=str(fault))
        ending = Refused(Reason.STORAGE_FULL if is_full(fault) else Reason.INTERNAL, str(fault))
    except Exception:  # the top of an RPC: gRPC would tell the peer the error's text
        _log.exception("rpc failed", rpc=rpc)
        ending = Refused(Reason.INTERNAL, "the coordinator failed on this call: see its log")
    else:
        return
    context.set_trailing_metadata(refusal_trailers(ending))
    context.abort(RULES[ending.reason].code, ending.reason.name)
