"""EnrolmentService: a secret buys a certificate."""

import hashlib
import time
from typing import Any

import grpc
import structlog

from coordinator.authority import Authority, parse_certificate_request
from coordinator.services.access import public_key_sha256, refusing
from coordinator.services.limits import Admission
from coordinator.store import Store
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc

_log = structlog.get_logger()


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """Issues client certificates to holders of an invitation."""

    def __init__(
        self, authority: Authority, store: Store, control_address: str, admission: Admission
    ) -> None:
        self._authority = authority
        self._store = store
        self._control_address = control_address
        self._admission = admission

    async def Enrol(  # noqa: N802 - gRPC's name
        self,
        request: enrolment_pb2.EnrolRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> enrolment_pb2.EnrolResponse:
        """Verify the request before the secret is touched, then bind the secret to its key."""
        async with refusing(context, "Enrol"), self._admission.call(context.peer()) as call:
            succeeded = await call.join()
            signing_request = parse_certificate_request(request.certificate_request)
            agent_id = self._store.redeem_invitation(
                hashlib.sha256(request.secret).digest(),
                public_key_sha256(signing_request),
                time.time(),
            )
            succeeded()
            _log.info("agent enrolled", agent=agent_id)
            return enrolment_pb2.EnrolResponse(
                agent_id=agent_id,
                certificate=self._authority.issue_agent(signing_request, agent_id),
                control_address=self._control_address,
            )
        raise AssertionError("refusing() aborts the RPC")
