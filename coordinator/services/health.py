"""The standard health service (grpc.health.v1), and the gate that makes its answer true."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedloom.errors import RULES, Reason, Refused, refusal_trailers

SERVICES = (
    "",  # the process as a whole
    "fedloom.v1.ControlService",
    "fedloom.v1.ArtifactService",
    "fedloom.v1.EnrolmentService",
)
_OWN_RPCS = "/grpc.health.v1.Health/"
_CLOSED = Refused(Reason.INTERNAL, "the coordinator starts or stops: connect again")


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # comes untyped
    """Answers `Check`, to anyone: a load balancer has no certificate of ours.

    `Watch` is not served, which the protocol allows: it would let anyone hold streams open.
    """

    def __init__(self) -> None:
        self.serving = False  # until the server listens, and again as soon as it shuts down

    async def Check(  # noqa: N802 - gRPC's name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """Say whether the service takes calls; NOT_FOUND for one that is not here."""
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "expected a service of this coordinator")
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving else status.NOT_SERVING)

    async def Watch(  # noqa: N802 - gRPC's name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Refuse; clients then go on with `Check`."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "expected Check: Watch is not served")


class HealthGate(grpc.aio.ServerInterceptor):
    """Refuses new calls while the coordinator does not serve; agents then connect again later."""

    def __init__(self, health: HealthService) -> None:
        self._health = health

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, or one that refuses."""
        if self._health.serving or handler_call_details.method.startswith(_OWN_RPCS):
            return await continuation(handler_call_details)
        return _REFUSAL


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    code = RULES[_CLOSED.reason].code
    await context.abort(code, _CLOSED.reason.name, refusal_trailers(_CLOSED))


_REFUSAL: Any = grpc.stream_stream_rpc_method_handler(_refuse)  # to the wire, calls of all kinds
