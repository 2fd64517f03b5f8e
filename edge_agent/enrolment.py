"""Joining a federation: one call, with a key that never leaves the device."""

import asyncio
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from edge_agent.connection import Backoff, open_channel, understood
from edge_agent.identity import Identity, certificate_request, new_key, save_membership
from fedloom.errors import Reason, Refused
from fedloom.tokens import parse_token
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc

JOIN_SECONDS = 30.0
JOIN_TRIES = 10  # while the coordinator is busy
FIRST_BACKOFF_SECONDS = 1.0


async def join(home: Path, token_text: str) -> Identity:
    """Exchange the token for a certificate and pin the authority.

    Raises Refused (INVALID_TOKEN, TOKEN_EXPIRED) or Unreachable; a repeat after a lost answer is
    safe, because the key is kept.
    """
    token = parse_token(token_text)
    try:
        authority = x509.load_der_x509_certificate(token.authority_certificate)
    except ValueError as error:
        raise Refused(Reason.INVALID_TOKEN, "expected an authority in the token") from error
    key = new_key(home)
    pem = authority.public_bytes(serialization.Encoding.PEM)
    async with open_channel(token.address, grpc.ssl_channel_credentials(pem)) as channel:
        request = enrolment_pb2.EnrolRequest(
            secret=token.secret, certificate_request=certificate_request(key)
        )
        response = await _enrolled(channel, request, token.address)
    return save_membership(
        home, key, response.certificate, token.authority_certificate, response.control_address
    )


async def _enrolled(
    channel: grpc.aio.Channel,
    request: enrolment_pb2.EnrolRequest,
    address: str,
) -> enrolment_pb2.EnrolResponse:
    """Ask until the coordinator is not busy, a few times; raises Refused or Unreachable."""
    stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
    backoff = Backoff(FIRST_BACKOFF_SECONDS, JOIN_SECONDS)
    for tries_left in reversed(range(JOIN_TRIES)):
        backoff.attempt()
        try:
            return await stub.Enrol(request, timeout=JOIN_SECONDS)
        except grpc.aio.AioRpcError as error:
            cause = understood(error, address)
            busy = isinstance(cause, Refused) and cause.reason is Reason.BUSY
            if not (busy and tries_left):
                raise cause from error
        await asyncio.sleep(backoff.pause(cause))
    raise AssertionError("the last try returns or raises")
