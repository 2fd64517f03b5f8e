"""The federation's authority as this coordinator holds it: what devices pin, and who may issue.

Three custodies of the key that names agents. Only in the last is a lying coordinator unable to make
up members; in the first two it can.

    BESIDE    the root's key lies here             authority.pem, authority.key
    ISSUING   the root is offline and has given    authority.pem, issuing.pem (key and certificate)
              this coordinator an issuing key
    OFFLINE   the root is offline and signs every  authority.pem
              agent itself (`ca requests`, `ca sign`, `ca install`)

In the folder as well: server.pem and server.key, and in the last two custodies issuing.key, the key
of a request that the root may sign.
"""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.certificates import (
    Issuer,
    alternative_name,
    new_key,
    private_key_pem,
)
from fedloom.chains import MAX_CERTIFICATE_BYTES, needs_renewal, public_key_bytes
from fedloom.errors import ConfigError
from fedloom.secret_files import write_secret

AUTHORITY_FILE = "authority.pem"
AUTHORITY_KEY_FILE = "authority.key"
ISSUING_FILE = "issuing.pem"
ISSUING_KEY_FILE = "issuing.key"
SERVER_FILE = "server.pem"
SERVER_KEY_FILE = "server.key"
HOW_TO_RENEW = "ca requests, ca sign at the root, ca install"
_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER
_log = structlog.get_logger()


class Custody(Enum):
    """Where the key is that names agents."""

    BESIDE = "beside the coordinator"
    ISSUING = "offline, with an issuing key at the coordinator"
    OFFLINE = "offline"


@dataclass(frozen=True)
class ServerIdentity:
    """What the server shows to TLS peers, and what it pins, all PEM."""

    private_key: bytes
    certificate: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "ServerIdentity(...)"


class Authority:
    """Issues certificates, if its custody lets it; `certificate` is what devices pin."""

    def __init__(
        self, certificate: x509.Certificate, custody: Custody, issuer: Issuer | None
    ) -> None:
        self.certificate = certificate
        self.custody = custody
        self._issuer = issuer

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str]) -> "Authority":
        """Make an authority beside the coordinator, and a server certificate for `hosts`."""
        _require_new(folder)
        names = server_names(hosts)
        root, key = Issuer.new_root(path_length=0), new_key()
        write_secret(folder / SERVER_KEY_FILE, private_key_pem(key))
        _write(folder / SERVER_FILE, root.server(key.public_key(), names))
        write_secret(folder / AUTHORITY_KEY_FILE, private_key_pem(root.key))
        _write(folder / AUTHORITY_FILE, root.certificate)  # last: it makes the folder a whole one
        return cls.load(folder)

    @classmethod
    def adopt(cls, folder: Path, root: x509.Certificate) -> "Authority":
        """Take an offline root for the authority; `ca requests` asks it for certificates."""
        _require_new(folder)
        write_secret(folder / SERVER_KEY_FILE, private_key_pem(new_key()))
        _write(folder / AUTHORITY_FILE, root)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read the authority of a coordinator's folder."""
        certificate = load_certificate(folder / AUTHORITY_FILE)
        if (folder / AUTHORITY_KEY_FILE).exists():
            key = load_key(folder / AUTHORITY_KEY_FILE)
            return cls(certificate, Custody.BESIDE, Issuer(certificate, key))
        if (folder / ISSUING_FILE).exists():
            issuing = load_certificate(folder / ISSUING_FILE)
            require_issued(issuing, certificate, ISSUING_FILE)
            issuer = Issuer(issuing, load_key(folder / ISSUING_FILE))
            return cls(certificate, Custody.ISSUING, issuer)
        return cls(certificate, Custody.OFFLINE, None)

    @property
    def certificate_der(self) -> bytes:
        """The authority's certificate as tokens carry it."""
        return self.certificate.public_bytes(_DER)

    @property
    def is_offline(self) -> bool:
        """Whether no key that could name an agent is here: then this coordinator can forge none.

        A root of path length 0 makes this certain to devices as well: below it no issuing
        certificate is valid. Of any other root it says what is so now, not what once was signed.
        """
        return self.custody is Custody.OFFLINE

    def can_issue(self, now: datetime) -> bool:
        """Whether a device gets its certificate at once."""
        return self._issuer is not None and now < self._issuer.certificate.not_valid_after_utc

    def issue_agent(
        self, request: x509.CertificateSigningRequest, agent_id: str
    ) -> tuple[bytes, ...]:
        """Return a client certificate for the key of a parsed request and its issuers, DER."""
        issuer = self._able_issuer()
        return self._chain(issuer, issuer.agent(request.public_key(), agent_id))

    def issue_operator(
        self, request: x509.CertificateSigningRequest, name: str
    ) -> tuple[bytes, ...]:
        """Return an operator's client certificate and its issuers, DER."""
        issuer = self._able_issuer()
        return self._chain(issuer, issuer.operator(request.public_key(), name))

    def keep_server_current(self, folder: Path, hosts: Sequence[str], now: datetime) -> None:
        """Renew the server's certificate when it ends soon or lacks a name; at start.

        The key stays the same, so that one file is replaced at once. With a root that is offline
        this only warns.
        """
        found = load_certificate(_signed_server_file(folder))
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names, wanted = list(alternatives.value), server_names(hosts)
        missing = [name for name in wanted[: len(hosts)] if name not in names]
        if self.custody is Custody.BESIDE and (missing or needs_renewal(found, now)):
            issued = self._able_issuer().server(found.public_key(), [*names, *missing])
            _write(folder / SERVER_FILE, issued)
            _log.info("server certificate renewed", until=_day(issued))
            return
        if missing:
            _log.warning("server certificate lacks a name", names=[name.value for name in missing])
        self._warn_of_end(found, "server certificate ends soon", now)
        if self._issuer is not None:
            self._warn_of_end(self._issuer.certificate, "issuing certificate ends soon", now)

    def _warn_of_end(self, certificate: x509.Certificate, event: str, now: datetime) -> None:
        if needs_renewal(certificate, now):
            # Of a root beside the coordinator there is no renewal: devices pin it.
            commands = "" if certificate == self.certificate else HOW_TO_RENEW
            _log.warning(event, until=_day(certificate), commands=commands)

    def _able_issuer(self) -> Issuer:
        if self._issuer is None:
            raise ConfigError("authority", "expected an issuing key; the root of this one signs")
        return self._issuer

    def _chain(self, issuer: Issuer, certificate: x509.Certificate) -> tuple[bytes, ...]:
        chain = [certificate]
        if issuer.certificate != self.certificate:
            chain.append(issuer.certificate)
        return tuple(link.public_bytes(_DER) for link in chain)


def authority_is_offline(folder: Path) -> bool:
    """Whether the coordinator of this folder is unable to forge members; see Authority."""
    return Authority.load(folder).is_offline


def load_server_identity(folder: Path) -> ServerIdentity:
    """Read what the server shows to its peers."""
    return ServerIdentity(
        (folder / SERVER_KEY_FILE).read_bytes(),
        _signed_server_file(folder).read_bytes(),
        (folder / AUTHORITY_FILE).read_bytes(),
    )


def load_root(path: Path) -> x509.Certificate:
    """Read the certificate of an offline root, as it was brought here; raises ConfigError."""
    if b"PRIVATE KEY" in path.read_bytes():
        raise ConfigError(str(path), "expected the certificate alone: the key stays at the root")
    root = load_certificate(path)
    require_issued(root, root, str(path))
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints).value
    if not constraints.ca or len(root.public_bytes(_DER)) > MAX_CERTIFICATE_BYTES // 2:
        raise ConfigError(str(path), "expected the certificate that `ca create` made")
    return root


def server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return what a server certificate states: these hosts first, then this machine's names."""
    here = ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    return list(dict.fromkeys(alternative_name(host) for host in [*hosts, *here]))


def require_issued(certificate: x509.Certificate, issuer: x509.Certificate, where: str) -> None:
    """Raise ConfigError unless the issuer has signed the certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(where, "expected a certificate that the authority has signed") from error


def load_certificate(path: Path) -> x509.Certificate:
    """Read a file's certificate; raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(path), f"expected a certificate; a coordinator's folder is made by `init` ({error})"
        ) from error


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a file's private key; raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(str(path), "expected a private key without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(str(path), "expected an ECDSA key")
    return key


def key_fingerprint(holder: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the SHA-256 of the public key, for people to compare."""
    return hashlib.sha256(public_key_bytes(holder)).hexdigest()


def _signed_server_file(folder: Path) -> Path:
    path = folder / SERVER_FILE
    if not path.exists() and (folder / SERVER_KEY_FILE).exists():
        raise ConfigError(str(path), f"expected what the root has to sign first: {HOW_TO_RENEW}")
    return path


def _require_new(folder: Path) -> None:
    if (folder / AUTHORITY_FILE).exists():
        raise ConfigError(str(folder), "has a coordinator already; choose another --home")


def _write(path: Path, certificate: x509.Certificate) -> None:
    write_secret(path, certificate.public_bytes(_PEM))  # no secret, but whole or not at all


def _day(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.astimezone(UTC).date().isoformat()
