"""The standard health service (grpc.health.v1): whether this coordinator takes work."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES = (
    "",  # the process as a whole
    "fedloom.v1.ControlService",
    "fedloom.v1.ArtifactService",
    "fedloom.v1.EnrolmentService",
)


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
