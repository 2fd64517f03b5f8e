"""The two files that travel between a coordinator and its offline root: JSON, to be read.

Neither holds a secret, and neither is believed: each side checks what the other has written.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.authority import key_fingerprint
from coordinator.certificates import parse_certificate_request
from coordinator.roster import require_name
from fedloom.errors import ConfigError, Refused

MAX_FILE_BYTES = 64 << 20
_HOST = re.compile(r"[A-Za-z0-9_.*:-]{1,255}")
_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER


class Kind(Enum):
    """What a certificate is for."""

    SERVER = "server"
    ISSUING = "issuing"
    AGENT = "agent"


@dataclass(frozen=True)
class SigningRequest:
    """A key that shall be certified, and under which name."""

    kind: Kind
    name: str
    request: x509.CertificateSigningRequest
    former_key_signature: bytes = b""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the key."""
        return key_fingerprint(self.request)

    @property
    def alternatives(self) -> list[str]:
        """The host names and addresses that a server asks for; raises ConfigError."""
        try:
            kind = x509.SubjectAlternativeName
            names = list(self.request.extensions.get_extension_for_class(kind).value)
        except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
            raise ConfigError(f"server {self.name}", "expected a request with names") from error
        found = [str(name.value) for name in names]
        # Its first reader is a terminal at the root.
        if not all(_HOST.fullmatch(host) for host in found):
            raise ConfigError(f"server {self.name}", "expected host names and IP addresses")
        return found


@dataclass(frozen=True)
class Granted:
    """A certificate that the root has signed."""

    kind: Kind
    name: str
    certificate: x509.Certificate


def write_requests(
    path: Path, authority: x509.Certificate, found: Sequence[SigningRequest]
) -> None:
    """Write the file that goes to the root."""
    rows = [
        {
            "kind": one.kind.value,
            "name": one.name,
            "request": one.request.public_bytes(_PEM).decode(),
            "former_key_signature": one.former_key_signature.hex(),
        }
        for one in found
    ]
    _write(path, authority, "requests", rows)


def read_requests(path: Path, authority: x509.Certificate) -> list[SigningRequest]:
    """Read a file from a coordinator, foreign as it is; raises ConfigError."""
    return [_read_request(path, row) for row in _read(path, authority, "requests")]


def write_granted(path: Path, authority: x509.Certificate, granted: Sequence[Granted]) -> None:
    """Write the file that goes back to the coordinator."""
    rows = [
        {
            "kind": one.kind.value,
            "name": one.name,
            "certificate": one.certificate.public_bytes(_PEM).decode(),
        }
        for one in granted
    ]
    _write(path, authority, "certificates", rows)


def read_granted(path: Path, authority: x509.Certificate) -> list[Granted]:
    """Read what the root has signed; raises ConfigError."""
    found = []
    for row in _read(path, authority, "certificates"):
        try:
            certificate = x509.load_pem_x509_certificate(row["certificate"].encode())
            one = Granted(Kind(row["kind"]), row["name"], certificate)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(str(path), "expected what `ca sign` wrote") from error
        if not isinstance(one.name, str) or not _HOST.fullmatch(one.name):
            raise ConfigError(str(path), "expected a name, or the coordinator's address")
        found.append(one)
    return found


def _read_request(path: Path, row: dict[str, Any]) -> SigningRequest:
    try:
        request = x509.load_pem_x509_csr(row["request"].encode())
        found = SigningRequest(
            Kind(row["kind"]),
            row["name"],
            parse_certificate_request(request.public_bytes(_DER)),
            bytes.fromhex(row["former_key_signature"]),
        )
        if found.kind is Kind.AGENT:
            require_name(found.name)
    except (KeyError, ValueError, TypeError, AttributeError, Refused) as error:
        raise ConfigError(str(path), "expected what `ca requests` wrote") from error
    if found.kind is not Kind.AGENT and not _HOST.fullmatch(found.name):
        raise ConfigError(str(path), "expected the coordinator's address")
    return found


def _write(
    path: Path, authority: x509.Certificate, content: str, rows: Sequence[dict[str, str]]
) -> None:
    table = {"authority_key_sha256": key_fingerprint(authority), content: rows}
    path.write_text(json.dumps(table, indent=1) + "\n")


def _read(path: Path, authority: x509.Certificate, content: str) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(str(path), f"expected at most {MAX_FILE_BYTES} bytes")
        table = json.loads(path.read_bytes())
        stated, rows = table["authority_key_sha256"], table[content]
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), f"expected a file of {content}") from error
    if stated != key_fingerprint(authority):
        raise ConfigError(str(path), "is for another authority than the one here")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(str(path), f"expected a list of {content}")
    return rows
