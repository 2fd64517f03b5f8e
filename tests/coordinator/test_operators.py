"""Operators elsewhere: admitted by the certificate that the coordinator keeps, by nothing else."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from coordinator.operators import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    OPERATOR_ROLE,
    Operators,
)
from fedloom.errors import ConfigError, Reason, Refused


@pytest.fixture
def operators(tmp_path: Path) -> Operators:
    return Operators(tmp_path)


def test_an_operator_is_known_by_its_certificate_until_it_is_removed(
    operators: Operators, tmp_path: Path
) -> None:
    for name in ("ada", "grace"):
        operators.add(name, b"authority", tmp_path / name)
    shown = {name: (tmp_path / name / CERTIFICATE_FILE).read_bytes() for name in ("ada", "grace")}
    assert operators.names() == ["ada", "grace"]
    assert {operators.identify(pem): pem for pem in shown.values()} == shown
    operators.remove("ada")
    with pytest.raises(Refused) as caught:
        operators.identify(shown["ada"])
    assert caught.value.reason is Reason.NOT_PERMITTED
    assert operators.identify(shown["grace"]) == "grace"
    operators.add("ada", b"authority", tmp_path / "ada again")
    with pytest.raises(Refused):  # the name is admitted, the old key is not
        operators.identify(shown["ada"])


def test_what_an_operator_is_given(operators: Operators, tmp_path: Path) -> None:
    out = tmp_path / "ada"
    operators.add("ada", b"authority", out)
    assert (out.stat().st_mode & 0o777, (out / KEY_FILE).stat().st_mode & 0o777) == (0o700, 0o600)
    assert (out / AUTHORITY_FILE).read_bytes() == b"authority"
    certificate = x509.load_pem_x509_certificate((out / CERTIFICATE_FILE).read_bytes())
    named = {attribute.oid: attribute.value for attribute in certificate.subject}
    assert named == {NameOID.COMMON_NAME: "ada", NameOID.ORGANIZATIONAL_UNIT_NAME: OPERATOR_ROLE}
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca  # it vouches for nobody
    assert b"PRIVATE" not in b"".join(operators.certificates())


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", "a" * 65])
def test_a_name_that_is_none(operators: Operators, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        operators.add(name, b"", tmp_path / "out")
    with pytest.raises(ConfigError):
        operators.remove(name)
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced(operators: Operators, tmp_path: Path) -> None:
    operators.add("ada", b"", tmp_path / "ada")
    before = operators.certificates()
    for name, out in (("ada", "new"), ("grace", "ada")):
        with pytest.raises(ConfigError, match="exists"):
            operators.add(name, b"", tmp_path / out)
    assert operators.certificates() == before


def test_a_caller_that_shows_none_is_refused(operators: Operators) -> None:
    with pytest.raises(Refused):
        operators.identify(None)
