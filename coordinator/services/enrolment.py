"""EnrolmentService: a secret buys a certificate, and a certificate the next one."""

import hashlib
import time
from datetime import UTC, datetime
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from coordinator.audit import Action, AuditLog
from coordinator.authority import Authority
from coordinator.certificates import parse_certificate_request
from coordinator.roster import Roster
from coordinator.roster_records import CertificateRequest
from coordinator.services.access import Peer, calling_peer, public_key_sha256, refusing
from coordinator.services.limits import Admission
from fedloom.errors import Reason, Refused
from fedloom.renewals import check_renewal
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc

PENDING_SECONDS = 30.0  # between two questions of a device that waits for a person


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """Issues client certificates, or keeps requests for an authority that is offline."""

    def __init__(
        self,
        authority: Authority,
        roster: Roster,
        control_address: str,
        audit: AuditLog,
        admission: Admission,
    ) -> None:
        self._authority = authority
        self._roster = roster
        self._control_address = control_address
        self._audit = audit
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
            asked = self._roster.redeem(
                hashlib.sha256(request.secret).digest(),
                public_key_sha256(signing_request),
                request.certificate_request,
                time.time(),
            )
            succeeded()  # whether or not a person has yet to sign
            certificate, *issuers = self._granted(asked, signing_request, Action.AGENT_ENROLLED)
            return enrolment_pb2.EnrolResponse(
                agent_id=asked.agent_id,
                certificate=certificate,
                control_address=self._control_address,
                issuers=issuers,
            )
        raise AssertionError("refusing() aborts the RPC")

    async def Renew(  # noqa: N802 - gRPC's name
        self,
        request: enrolment_pb2.RenewRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> enrolment_pb2.RenewResponse:
        """Give the calling agent a certificate that ends later; the old one stays good."""
        async with refusing(context, "Renew"), self._admission.call(context.peer()) as call:
            peer = calling_peer(context)
            await call.renewal(peer.name)
            signing_request = parse_certificate_request(request.certificate_request)
            asked = CertificateRequest(
                peer.name,
                public_key_sha256(signing_request),
                request.certificate_request,
                request.former_key_signature,
            )
            _require_vouched(asked, peer)
            asked = self._roster.renewal(asked, peer.until.timestamp(), time.time())
            certificate, *issuers = self._granted(asked, signing_request, Action.CERTIFICATE_ISSUED)
            return enrolment_pb2.RenewResponse(certificate=certificate, issuers=issuers)
        raise AssertionError("refusing() aborts the RPC")

    def _granted(
        self,
        asked: CertificateRequest,
        signing_request: x509.CertificateSigningRequest,
        action: Action,
    ) -> tuple[bytes, ...]:
        """Return the certificate and its issuers; raises Refused(ENROLMENT_PENDING)."""
        if asked.chain:
            return asked.chain
        if not self._authority.can_issue(datetime.now(UTC)):
            raise Refused(
                Reason.ENROLMENT_PENDING,
                f"the authority is offline and has yet to sign the key of {asked.agent_id}",
                retry_after=PENDING_SECONDS,
            )
        chain = self._authority.issue_agent(signing_request, asked.agent_id)
        self._roster.grant(asked.agent_id, asked.public_key_sha256, chain, time.time())
        self._audit.append(f"agent {asked.agent_id}", action, asked.agent_id)
        return chain


def _require_vouched(asked: CertificateRequest, peer: Peer) -> None:
    if asked.public_key_sha256 == peer.public_key_sha256:
        return
    try:
        check_renewal(peer.certificate.public_key(), asked.request, asked.former_key_signature)
    except InvalidSignature as error:
        raise Refused(
            Reason.MALFORMED, "expected a request for a new key, signed by the old one"
        ) from error
