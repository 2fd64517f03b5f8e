"""Joining a federation: one call, with a key that never leaves the device."""

from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from edge_agent.connection import open_channel, understood
from edge_agent.identity import Identity, certificate_request, new_key, save_membership
from fedloom.errors import Reason, Refused
from fedloom.tokens import parse_token
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc

JOIN_SECONDS = 30.0


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
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        request = enrolment_pb2.EnrolRequest(
            secret=token.secret, certificate_request=certificate_request(key)
        )
        try:
            response = await stub.Enrol(request, timeout=JOIN_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise understood(error, token.address) from error
    return save_membership(
        home, key, response.certificate, token.authority_certificate, response.control_address
    )
