"""Joining a federation and staying in it, with keys that never leave the device."""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.connection import Backoff, Unreachable, open_channel, understood
from edge_agent.identity import (
    Identity,
    certificate_request,
    joining_key,
    key_fingerprint,
    request_key,
    save_membership,
    save_renewal,
)
from fedloom.chains import needs_renewal
from fedloom.errors import Reason, Refused
from fedloom.renewals import sign_renewal
from fedloom.tokens import EnrolmentToken, parse_token
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc

CALL_SECONDS = 30.0
JOIN_TRIES = 10  # while the coordinator is busy
RENEWAL_CHECK_SECONDS = 86_400.0
RENEWAL_RETRY_SECONDS = 3600.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0  # or as long as the coordinator says
_DER = serialization.Encoding.DER
_log = structlog.get_logger()


async def join(
    home: Path,
    token_text: str,
    waiting: Callable[[str], None] = lambda fingerprint: None,
) -> Identity:
    """Exchange the token for a certificate and pin the authority.

    Where the authority is offline, `waiting` is told once the fingerprint of this device's key, and
    the call lasts until an operator has had it signed. It may be broken off: a repeat with the same
    token goes on, because the key is kept. Raises Refused or Unreachable.
    """
    token = parse_token(token_text)
    try:
        authority = x509.load_der_x509_certificate(token.authority_certificate)
    except ValueError as error:
        raise Refused(Reason.INVALID_TOKEN, "expected an authority in the token") from error
    key = joining_key(home)
    pem = authority.public_bytes(serialization.Encoding.PEM)
    async with open_channel(token.address, grpc.ssl_channel_credentials(pem)) as channel:
        response = await _enrolled(channel, token, key, waiting)
    chain = (response.certificate, *response.issuers)
    return save_membership(home, key, chain, authority, response.control_address)


async def _enrolled(
    channel: grpc.aio.Channel,
    token: EnrolmentToken,
    key: ec.EllipticCurvePrivateKey,
    waiting: Callable[[str], None],
) -> enrolment_pb2.EnrolResponse:
    stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
    signing_request = certificate_request(key)
    request = enrolment_pb2.EnrolRequest(
        secret=token.secret, certificate_request=signing_request.public_bytes(_DER)
    )
    told, tries = False, 0
    backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
    while True:
        backoff.attempt()
        try:
            return await stub.Enrol(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            cause = understood(error, token.address)
            tries += 1
            if not _may_pass(cause, tries, told):
                raise cause from error
        if _is_refused(cause, Reason.ENROLMENT_PENDING) and not told:
            waiting(key_fingerprint(signing_request))
            told = True
        await asyncio.sleep(backoff.pause(cause))


async def until_renewed(home: Path, identity: Identity) -> Identity:
    """Return a newer identity once there is one: looked at now and then daily.

    What fails is logged and tried again. The old identity stays good: the newer one is used with
    the next connection.
    """
    while True:
        wait = RENEWAL_CHECK_SECONDS
        if needs_renewal(identity.certificate, datetime.now(UTC)):
            try:
                return await renew(home, identity)
            except (Refused, Unreachable, OSError) as error:
                _log.warning("certificate not renewed", cause=str(error))
                wait = RENEWAL_RETRY_SECONDS
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads a fleet


async def renew(home: Path, identity: Identity) -> Identity:
    """Exchange the device's key and certificate for new ones; raises Refused or Unreachable.

    Until the new ones are on disk, both in one file, the old ones stay there and stay good.
    """
    key = request_key(home)
    request = certificate_request(key).public_bytes(_DER)
    message = enrolment_pb2.RenewRequest(
        certificate_request=request, former_key_signature=sign_renewal(identity.key, request)
    )
    address = identity.control_address
    async with open_channel(address, identity.channel_credentials()) as channel:
        try:
            stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            response = await stub.Renew(message, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise understood(error, address) from error
    chain = (response.certificate, *response.issuers)
    renewed = save_renewal(home, identity, key, chain)
    _log.info("certificate renewed", until=renewed.certificate.not_valid_after_utc.isoformat())
    return renewed


def _may_pass(cause: Exception, tries: int, told: bool) -> bool:
    """Tell whether to ask again; who waits for a signature outlives a restart there too."""
    if isinstance(cause, Unreachable):
        return told and not cause.hopeless
    if _is_refused(cause, Reason.BUSY):
        return told or tries < JOIN_TRIES
    return _is_refused(cause, Reason.ENROLMENT_PENDING)


def _is_refused(cause: Exception, reason: Reason) -> bool:
    return isinstance(cause, Refused) and cause.reason is reason
