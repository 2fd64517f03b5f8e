"""The enrolment token: what an operator hands to a device, as one line of text."""

import base64
import binascii
import ipaddress
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from fedloom.errors import Reason, Refused
from fedloom.v1 import enrolment_pb2

SECRET_BYTES = 32
_PREFIX = "fl1_"
_MAX_TEXT = 8192


@dataclass(frozen=True)
class EnrolmentToken:
    """Where to enrol, with what, and whose server to trust; `repr` shows no secret."""

    address: str
    secret: bytes = field(repr=False)
    authority_certificate: bytes = field(repr=False)  # X.509, DER

    def encode(self) -> str:
        """Return the line of text."""
        message = enrolment_pb2.EnrolmentToken(
            address=self.address,
            secret=self.secret,
            authority_certificate=self.authority_certificate,
        )
        return _PREFIX + base64.urlsafe_b64encode(message.SerializeToString()).rstrip(b"=").decode()


def parse_token(text: str) -> EnrolmentToken:
    """Read a token; raises Refused(INVALID_TOKEN) that repeats nothing of it."""
    text = text.strip()
    wrong = Refused(
        Reason.INVALID_TOKEN,
        f"expected the whole line that `invite` printed, starting with {_PREFIX}; found "
        f"{len(text)} characters that are none",
    )
    if not text.startswith(_PREFIX) or len(text) > _MAX_TEXT:
        raise wrong
    body = text.removeprefix(_PREFIX)
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        message = enrolment_pb2.EnrolmentToken.FromString(data)
    except (binascii.Error, DecodeError, ValueError):
        raise wrong from None
    # Without its last field a token cut short would parse, and trust no authority or every one.
    whole = len(message.secret) == SECRET_BYTES and message.authority_certificate
    if not whole or not _is_address(message.address):
        raise wrong
    return EnrolmentToken(message.address, message.secret, message.authority_certificate)


def _is_address(text: str) -> bool:
    """Whether this is `host:port`, an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        return False
    if host.startswith("["):
        return host.endswith("]") and _is_ipv6(host[1:-1])
    return host != "" and ":" not in host and host.isprintable() and " " not in host


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
