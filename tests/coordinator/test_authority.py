"""The authority: TLS peers believe its certificates, and it signs for nobody's broken request."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from coordinator.authority import (
    AGENT_ROLE,
    MAX_REQUEST_BYTES,
    Authority,
    load_server_identity,
    parse_certificate_request,
)
from fedloom.errors import ConfigError, Reason, Refused

HOSTS = ("coordinator.example", "192.0.2.7", "2001:db8::7")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    Authority.create(folder, HOSTS)
    return folder


@pytest.fixture(scope="module")
def authority(home: Path) -> Authority:
    return Authority.load(home)


def request_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "device"
) -> x509.CertificateSigningRequest:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


def der(request: x509.CertificateSigningRequest) -> bytes:
    return request.public_bytes(serialization.Encoding.DER)


def write_agent(authority: Authority, folder: Path, agent_id: str) -> Path:
    """Enrol an agent as the service does; return its PEM file of key and certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = parse_certificate_request(der(request_of(key)))
    certificate = x509.load_der_x509_certificate(authority.issue_agent(request, agent_id))
    path = folder / f"{agent_id}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> ssl.SSLObject:
    """Do a TLS handshake in memory; return the server's end, or raise as the client does."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return far


def contexts(home: Path, agent: Path | None = None) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home / "server.pem", home / "server.key")
    client = ssl.create_default_context(cafile=str(home / "authority.pem"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    if agent is not None:
        server.load_verify_locations(home / "authority.pem")
        server.verify_flags |= ssl.VERIFY_X509_STRICT
        server.verify_mode = ssl.CERT_REQUIRED
        client.load_cert_chain(agent)
    return server, client


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1", "::1"])
def test_a_client_believes_the_server_under_its_names(home: Path, host: str) -> None:
    assert shake_hands(*contexts(home), host).version() in ("TLSv1.2", "TLSv1.3")


@pytest.mark.parametrize("host", ["elsewhere.example", "192.0.2.8", "2001:db8::8"])
def test_a_client_believes_the_server_under_no_other_name(home: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(*contexts(home), host)


def test_a_client_believes_no_other_authority(home: Path, tmp_path: Path) -> None:
    Authority.create(tmp_path, HOSTS)
    server, _ = contexts(home)
    _, client = contexts(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client, "localhost")


def test_the_server_learns_who_an_agent_is(
    home: Path, authority: Authority, tmp_path: Path
) -> None:
    agent = write_agent(authority, tmp_path, "kitchen-pi")
    peer = shake_hands(*contexts(home, agent), "localhost").getpeercert()
    assert peer is not None
    subject = dict(pair for part in peer["subject"] for pair in part)  # type: ignore[misc]
    assert subject == {"organizationalUnitName": AGENT_ROLE, "commonName": "kitchen-pi"}


def test_an_agent_of_another_authority_is_no_agent(home: Path, tmp_path: Path) -> None:
    other = Authority.create(tmp_path, HOSTS)
    agent = write_agent(other, tmp_path, "kitchen-pi")
    with pytest.raises(ssl.SSLError):
        shake_hands(*contexts(home, agent), "localhost")


def test_an_agents_certificate_is_for_clients_and_signs_nothing(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = parse_certificate_request(der(request_of(key, "someone-else")))
    issued = x509.load_der_x509_certificate(authority.issue_agent(request, "kitchen-pi"))
    issued.verify_directly_issued_by(authority.certificate)
    assert issued.public_key() == key.public_key()
    names = issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["kitchen-pi"]  # the request's name counts nothing
    constraints = issued.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    assert not issued.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    again = x509.load_der_x509_certificate(authority.issue_agent(request, "kitchen-pi"))
    assert again.serial_number != issued.serial_number


def refusal(data: bytes) -> Reason:
    with pytest.raises(Refused) as caught:
        parse_certificate_request(data)
    return caught.value.reason


def test_a_request_of_another_kind_of_key_is_refused() -> None:
    for key in (
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        assert refusal(der(request_of(key))) is Reason.MALFORMED


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    data = bytearray(der(request_of(ec.generate_private_key(ec.SECP256R1()))))
    place = data.index(b"device")
    data[place : place + 6] = b"coffee"
    assert refusal(bytes(data)) is Reason.MALFORMED


def test_a_request_of_any_other_bytes_is_refused() -> None:
    good = der(request_of(ec.generate_private_key(ec.SECP256R1())))
    assert parse_certificate_request(good).is_signature_valid
    assert refusal(good + bytes(MAX_REQUEST_BYTES)) is Reason.MALFORMED
    for length in range(len(good)):
        assert refusal(good[:length]) is Reason.MALFORMED


@given(st.binary(max_size=MAX_REQUEST_BYTES + 10))
def test_garbage_is_refused(data: bytes) -> None:
    assert refusal(data) is Reason.MALFORMED


_GOOD = der(request_of(ec.derive_private_key(7, ec.SECP256R1())))


@given(st.integers(0, len(_GOOD) - 1), st.integers(1, 255))
def test_no_byte_of_a_request_may_differ(place: int, change: int) -> None:
    data = bytearray(_GOOD)
    data[place] ^= change
    assert refusal(bytes(data)) is Reason.MALFORMED


def test_keys_are_files_for_their_owner_alone(home: Path) -> None:
    for name in ("authority.key", "server.key"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
    assert not list(home.glob("*.part"))


def test_a_folder_has_one_authority(home: Path) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    with pytest.raises(ConfigError, match="has a coordinator already"):
        Authority.create(home, HOSTS)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_an_authority_is_loaded_as_it_was_made(home: Path, authority: Authority) -> None:
    pem = (home / "authority.pem").read_bytes()
    assert x509.load_pem_x509_certificate(pem) == authority.certificate
    assert x509.load_der_x509_certificate(authority.certificate_der) == authority.certificate


def test_a_folder_without_an_authority_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `init` first"):
        Authority.load(tmp_path)
    (tmp_path / "authority.pem").write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="run `init` first"):
        Authority.load(tmp_path)


@pytest.mark.parametrize("host", ["bücher.example", "Ⅷ"])
def test_a_host_name_that_no_certificate_can_hold_is_a_config_error(
    tmp_path: Path, host: str
) -> None:
    with pytest.raises(ConfigError, match="ASCII"):
        Authority.create(tmp_path, [host])
    Authority.create(tmp_path, ["b.example"])  # the refused one left nothing behind


def test_a_server_identity_shows_no_key(home: Path) -> None:
    identity = load_server_identity(home)
    assert b"PRIVATE KEY" in identity.private_key
    assert "PRIVATE" not in repr(identity)
    assert identity.authority == (home / "authority.pem").read_bytes()
