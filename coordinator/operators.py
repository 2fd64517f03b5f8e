"""Operators on other machines: each has a key and a certificate that this coordinator pins.

The certificates are signed by their own keys, and those in the folder `operators` are what the
coordinator trusts: adding one needs no authority, which may be offline, an authority that is stolen
makes no operators, and removing the file shuts its owner out.
"""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.errors import ConfigError, Reason, Refused
from fedloom.secret_files import make_private_folder, write_secret

OPERATOR_ROLE = "operator"
FOLDER = "operators"
KEY_FILE = "operator.key"
CERTIFICATE_FILE = "operator.pem"
AUTHORITY_FILE = "authority.pem"
VALID_DAYS = 365
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_BACKDATED = timedelta(minutes=10)


class Operators:
    """Those whom a coordinator's folder admits."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER

    def names(self) -> list[str]:
        """Return the admitted operators' names."""
        return sorted(path.stem for path in self._folder.glob("*.pem"))

    def certificates(self) -> list[bytes]:
        """Return the admitted operators' certificates, PEM."""
        return [path.read_bytes() for path in sorted(self._folder.glob("*.pem"))]

    def add(self, name: str, authority: bytes, out: Path) -> None:
        """Admit a new operator; `out` gets what it shows, and the authority (PEM) that it pins."""
        if not _NAME.fullmatch(name):
            raise ConfigError("NAME", f"expected up to 64 of a-z, 0-9 and '-', found {name!r}")
        pinned = self._folder / f"{name}.pem"
        for taken in (pinned, out):
            if taken.exists():
                raise ConfigError(str(taken), "exists; choose another name, or remove it first")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(name, key).public_bytes(serialization.Encoding.PEM)
        make_private_folder(out)
        write_secret(out / KEY_FILE, _pem(key))
        (out / CERTIFICATE_FILE).write_bytes(certificate)
        (out / AUTHORITY_FILE).write_bytes(authority)
        make_private_folder(self._folder)
        pinned.write_bytes(certificate)

    def remove(self, name: str) -> None:
        """Shut an operator out, from its next request on."""
        if name not in self.names():
            raise ConfigError("NAME", f"expected one of {self.names()}, found {name!r}")
        (self._folder / f"{name}.pem").unlink()

    def identify(self, pem: bytes | None) -> str:
        """Return the name of the operator that shows this certificate; raises Refused."""
        if pem is not None:
            shown = x509.load_pem_x509_certificate(pem)
            for name in self.names():
                if x509.load_pem_x509_certificate(self._pinned(name)) == shown:
                    return name
        raise Refused(Reason.NOT_PERMITTED, "expected the certificate of an admitted operator")

    def _pinned(self, name: str) -> bytes:
        return (self._folder / f"{name}.pem").read_bytes()


def _self_signed(name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, OPERATOR_ROLE),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    now = datetime.now(UTC)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(key, hashes.SHA256())
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
