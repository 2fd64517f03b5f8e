"""Write `certificates.json`: keys that agents certify, and chains that must not be believed.

`python tests/vectors/make_certificates.py`. Keys, dates and signatures (RFC 6979) are fixed. Each
case is one advertised key, as `ExchangeKey` and `IdentityKey` carry it, the authority that the
reader has pinned, the time on its clock, and whether it may believe it. Bytes are hexadecimal.
"""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.certified_keys import EXCHANGE_KEY, IDENTITY_KEY, statement

FILE = Path(__file__).parent / "certificates.json"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY, YEAR = timedelta(days=1), timedelta(days=365)
PUBLIC_KEY = bytes(range(32))
NAME = "kitchen-pi"
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
DER = serialization.Encoding.DER

Key = ec.EllipticCurvePrivateKey
ROOT_KEY, ISSUING_KEY, SECOND_KEY, AGENT_KEY, FOREIGN_KEY = (
    ec.derive_private_key(number, ec.SECP256R1()) for number in range(11, 16)
)


def named(common_name: str, role: str) -> x509.Name:
    attributes = {NameOID.ORGANIZATIONAL_UNIT_NAME: role, NameOID.COMMON_NAME: common_name}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes.items() if text])


ROOT_NAME = named("Fedloom authority", "authority")
ISSUING_NAME = named("Fedloom issuing authority", "authority")
AGENT_NAME = named(NAME, "agent")
SECOND_NAME = named("second issuing authority", "authority")


@dataclass(frozen=True)
class Wanted:
    """A certificate to make; the defaults are an agent's, as the root itself issues it."""

    subject: x509.Name = AGENT_NAME
    key: Key = AGENT_KEY
    issuer: x509.Name = ROOT_NAME
    issuer_key: Key = ROOT_KEY
    authority: bool = False
    path_length: int | None = None
    usage: x509.ObjectIdentifier | None = CLIENT
    start: datetime = NOW - 30 * DAY
    end: datetime = NOW + YEAR

    def made(self) -> x509.Certificate:
        """Sign it."""
        constraints = x509.BasicConstraints(self.authority, self.path_length)
        signs = self.authority
        usages = x509.KeyUsage(*(not signs, False, False, False, False, signs, signs, False, False))
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(self.issuer)
            .public_key(self.key.public_key())
            .serial_number(7)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
            .add_extension(constraints, critical=True)
            .add_extension(usages, critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.issuer_key.public_key()),
                critical=False,
            )
        )
        if self.usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([self.usage]), critical=False)
        return builder.sign(self.issuer_key, hashes.SHA256(), ecdsa_deterministic=True)


ROOT = Wanted(ROOT_NAME, ROOT_KEY, authority=True, path_length=1, usage=None, end=NOW + 10 * YEAR)
STRICT_ROOT = replace(ROOT, path_length=0)
BROAD_ROOT = replace(ROOT, path_length=None)
SAME_NAME = replace(ROOT, key=FOREIGN_KEY, issuer_key=FOREIGN_KEY)
ISSUING = replace(ROOT, subject=ISSUING_NAME, key=ISSUING_KEY, path_length=0, end=NOW + 2 * YEAR)
AGENT = Wanted()
BELOW = replace(AGENT, issuer=ISSUING_NAME, issuer_key=ISSUING_KEY)
SECOND = replace(
    ISSUING, subject=SECOND_NAME, key=SECOND_KEY, issuer=ISSUING_NAME, issuer_key=ISSUING_KEY
)
BELOW_SECOND = replace(AGENT, issuer=SECOND_NAME, issuer_key=SECOND_KEY)


def case(name: str, believed: bool, *chain: Wanted, **changes: Any) -> dict[str, Any]:
    """Return one case; `changes` are what differs from a key that is in order."""
    label = changes.get("signed_label", IDENTITY_KEY)
    signed = statement(label, changes.get("signed_name", NAME), PUBLIC_KEY)
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    certificate, *issuers = [wanted.made().public_bytes(DER).hex() for wanted in chain]
    return {
        "case": name,
        "believed": believed,
        "label": IDENTITY_KEY.decode(),
        "agent_id": NAME,
        "public_key": changes.get("public_key", PUBLIC_KEY).hex(),
        "signature": changes.get("signer", AGENT_KEY).sign(signed, algorithm).hex(),
        "certificate": certificate,
        "issuers": issuers,
        "authority": changes.get("authority", ROOT).made().public_bytes(DER).hex(),
        "at": changes.get("at", NOW).isoformat(),
    }


def cases() -> list[dict[str, Any]]:
    """Return every case."""
    long_past = replace(AGENT, start=NOW - YEAR, end=NOW - 2 * DAY)
    return [
        case("issued by the root", True, AGENT),
        case("issued below the root", True, BELOW, ISSUING),
        case("issued by a strict root", True, AGENT, authority=STRICT_ROOT),
        case("an issuer that is not needed", True, AGENT, ISSUING),
        case("our clock is hours late", True, AGENT, at=AGENT.start - 0.9 * DAY),
        case("our clock is hours fast", True, AGENT, at=AGENT.end + 0.9 * DAY),
        case("our clock is days late", False, AGENT, at=AGENT.start - 1.1 * DAY),
        case("expired", False, long_past),
        case("expired with its issuer", False, BELOW, ISSUING, at=NOW + 3 * YEAR),
        case("outlives its issuer", False, BELOW, replace(ISSUING, end=NOW - DAY)),
        case("the authority has expired", False, AGENT, authority=replace(ROOT, end=NOW - DAY)),
        case("another name", False, replace(AGENT, subject=named("hall-pi", "agent"))),
        case("signed for another name", False, AGENT, signed_name="hall-pi"),
        case("an operator", False, replace(AGENT, subject=named(NAME, "operator"))),
        case("no role", False, replace(AGENT, subject=named(NAME, ""))),
        case("the server", False, replace(AGENT, usage=SERVER)),
        case("for any use", False, replace(AGENT, usage=None)),
        case("an authority itself", False, replace(AGENT, authority=True, path_length=0)),
        case("issuer left out", False, BELOW),
        case(
            "issuer without CA bit",
            False,
            BELOW,
            replace(ISSUING, authority=False, path_length=None),
        ),
        case(
            "issuer is an agent",
            False,
            BELOW,
            replace(AGENT, subject=ISSUING_NAME, key=ISSUING_KEY),
        ),
        case("issuer below a strict root", False, BELOW, ISSUING, authority=STRICT_ROOT),
        case("two issuers", False, BELOW_SECOND, SECOND, ISSUING, authority=BROAD_ROOT),
        case(
            "two issuers, no lengths",
            False,
            BELOW_SECOND,
            SECOND,
            replace(ISSUING, path_length=None),
            authority=BROAD_ROOT,
        ),
        case("another root of the same name", False, replace(AGENT, issuer_key=FOREIGN_KEY)),
        case(
            "another root of the same name, shown",
            False,
            replace(AGENT, issuer_key=FOREIGN_KEY),
            SAME_NAME,
        ),
        case(
            "signed by nobody but itself",
            False,
            replace(AGENT, issuer=AGENT.subject, issuer_key=AGENT_KEY),
        ),
        case("another key has signed", False, AGENT, signer=FOREIGN_KEY),
        case("another label was signed", False, AGENT, signed_label=EXCHANGE_KEY),
        case("another public key", False, AGENT, public_key=PUBLIC_KEY[::-1]),
        case("a public key too short", False, AGENT, public_key=PUBLIC_KEY[:31]),
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(cases(), indent=1) + "\n")
