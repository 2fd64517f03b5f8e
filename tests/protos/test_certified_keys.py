"""Keys certified by an agent: what is signed, to the byte, and everything that does not verify."""

import json
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from fedloom.certified_keys import (
    EXCHANGE_KEY,
    IDENTITY_KEY,
    CertifiedKey,
    certify,
    check_certified,
    statement,
)
from fedloom.chains import MAX_CERTIFICATE_BYTES
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.vectors import make_certificates
from tests.vectors.make_certificates import AGENT, BELOW, ISSUING, NAME, NOW, ROOT

KEY = bytes(range(32))
CASES: list[dict[str, Any]] = json.loads(make_certificates.FILE.read_text())
AUTHORITY = ROOT.made()
DER = make_certificates.DER


def test_the_statement_is_what_the_proto_says() -> None:
    assert statement(EXCHANGE_KEY, NAME, KEY) == b"fedloom v1 exchange key\0\x0akitchen-pi" + KEY
    assert statement(IDENTITY_KEY, NAME, KEY) == b"fedloom v1 identity key\0\x0akitchen-pi" + KEY


def test_the_committed_cases_are_what_the_script_makes() -> None:
    assert make_certificates.cases() == CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_a_key_is_believed_or_not(case: dict[str, Any]) -> None:
    key = CertifiedKey.of(
        control_pb2.IdentityKey(
            public_key=bytes.fromhex(case["public_key"]),
            signature=bytes.fromhex(case["signature"]),
            certificate=bytes.fromhex(case["certificate"]),
            issuers=[bytes.fromhex(issuer) for issuer in case["issuers"]],
        )
    )
    authority = x509.load_der_x509_certificate(bytes.fromhex(case["authority"]))
    at = datetime.fromisoformat(case["at"])
    reason = None
    try:
        check_certified(case["label"].encode(), case["agent_id"], key, authority, at)
    except Refused as refused:
        reason = refused.reason
    assert reason is (None if case["believed"] else Reason.KEY_UNAVAILABLE)


_signature = certify(IDENTITY_KEY, NAME, KEY, make_certificates.AGENT_KEY)
_chain = (BELOW.made().public_bytes(DER), ISSUING.made().public_bytes(DER))


def _refused(key: CertifiedKey) -> bool:
    try:
        check_certified(IDENTITY_KEY, NAME, key, AUTHORITY, NOW)
    except Refused as refused:
        return refused.reason is Reason.KEY_UNAVAILABLE
    return False


def test_a_key_in_order_is_believed() -> None:
    assert not _refused(CertifiedKey(KEY, _signature, _chain))


@given(st.integers(0, sum(map(len, _chain)) - 1), st.integers(1, 255))
def test_no_byte_of_a_chain_may_differ(place: int, change: int) -> None:
    data = bytearray(b"".join(_chain))
    data[place] ^= change
    length = len(_chain[0])
    chain = (bytes(data[:length]), bytes(data[length:]))
    assert _refused(CertifiedKey(KEY, _signature, chain))


@given(st.lists(st.binary(max_size=200), max_size=3), st.binary(max_size=100))
def test_garbage_is_refused(chain: list[bytes], signature: bytes) -> None:
    assert _refused(CertifiedKey(KEY, signature, tuple(chain)))
    leaf = AGENT.made().public_bytes(DER)
    assert _refused(CertifiedKey(KEY, signature, (leaf,)))
    assert _refused(CertifiedKey(KEY, _signature, (leaf, *chain))) == (chain != [])


def test_a_chain_too_large_is_refused_unread() -> None:
    padded = _chain[0] + bytes(MAX_CERTIFICATE_BYTES)
    assert _refused(CertifiedKey(KEY, _signature, (padded, _chain[1])))


def test_a_name_that_is_too_long_to_be_signed_is_refused() -> None:
    with pytest.raises(Refused, match="KEY_UNAVAILABLE"):
        check_certified(
            IDENTITY_KEY, "a" * 300, CertifiedKey(KEY, _signature, _chain), AUTHORITY, NOW
        )
