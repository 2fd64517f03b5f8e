"""Keys certified by an agent: what is signed, to the byte, and everything that does not verify."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedloom.certified_keys import EXCHANGE_KEY, IDENTITY_KEY, certify, check_certified, statement
from fedloom.errors import Reason, Refused

KEY = bytes(range(32))
NAME = "kitchen-pi"


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(issuer_key, hashes.SHA256())
    )


AUTHORITY_KEY, AGENT_KEY, STRANGER_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in "123")
AUTHORITY = _certificate("authority", AUTHORITY_KEY, "authority", AUTHORITY_KEY)
AGENT = _certificate(NAME, AGENT_KEY, "authority", AUTHORITY_KEY)
FORGED = _certificate(NAME, STRANGER_KEY, "authority", STRANGER_KEY)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def test_the_statement_is_what_the_proto_says() -> None:
    assert statement(EXCHANGE_KEY, NAME, KEY) == b"fedloom v1 exchange key\0\x0akitchen-pi" + KEY
    assert statement(IDENTITY_KEY, NAME, KEY) == b"fedloom v1 identity key\0\x0akitchen-pi" + KEY


def test_a_certified_key_verifies() -> None:
    signature = certify(IDENTITY_KEY, NAME, KEY, AGENT_KEY)
    check_certified(IDENTITY_KEY, NAME, KEY, signature, _der(AGENT), AUTHORITY)


@pytest.mark.parametrize("wrong", ["label", "name", "key", "signer", "chain", "garbage", "length"])
def test_anything_else_is_refused(wrong: str) -> None:
    signer = STRANGER_KEY if wrong in ("signer", "chain") else AGENT_KEY
    signature = certify(IDENTITY_KEY, NAME, KEY, signer)
    with pytest.raises(Refused) as refused:
        check_certified(
            EXCHANGE_KEY if wrong == "label" else IDENTITY_KEY,
            "hall-pi" if wrong == "name" else NAME,
            {"key": KEY[::-1], "length": KEY[:31]}.get(wrong, KEY),
            signature,
            {"chain": _der(FORGED), "garbage": b"garbage"}.get(wrong, _der(AGENT)),
            AUTHORITY,
        )
    assert refused.value.reason is Reason.KEY_UNAVAILABLE
