"""The authority: TLS peers believe its certificates, and it signs for nobody's broken request."""

import ssl
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from coordinator.authority import (
    Authority,
    Custody,
    authority_is_offline,
    load_certificate,
    load_root,
    load_server_identity,
)
from coordinator.certificates import (
    AGENT_DAYS,
    MAX_REQUEST_BYTES,
    SERVER_DAYS,
    Issuer,
    parse_certificate_request,
    private_key_pem,
)
from fedloom.chains import AGENT_ROLE, OPERATOR_ROLE, Subject, needs_renewal, subject_of
from fedloom.errors import ConfigError, Reason, Refused
from tests.coordinator.holders import PEM, Holder

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
    """Enrol an agent as the service does; return its PEM file of key and chain."""
    device = Holder()
    chain = authority.issue_agent(parse_certificate_request(device.request_der), agent_id)
    return replace(device, chain=chain).write(folder / f"{agent_id}.pem")


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
    [issued] = map(x509.load_der_x509_certificate, authority.issue_agent(request, "kitchen-pi"))
    issued.verify_directly_issued_by(authority.certificate)
    assert issued.public_key() == key.public_key()
    names = issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["kitchen-pi"]  # the request's name counts nothing
    constraints = issued.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    assert not issued.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    [again] = map(x509.load_der_x509_certificate, authority.issue_agent(request, "kitchen-pi"))
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
    with pytest.raises(ConfigError, match="made by `init`"):
        Authority.load(tmp_path)
    (tmp_path / "authority.pem").write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="made by `init`"):
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


def test_an_operator_is_named_as_one(authority: Authority) -> None:
    [issued] = authority.issue_operator(Holder().request, "alice")
    assert subject_of(x509.load_der_x509_certificate(issued)) == Subject("alice", OPERATOR_ROLE)


NOW = datetime.now(UTC)


@pytest.fixture
def young(tmp_path: Path) -> Path:
    """A folder of its own, for what changes files."""
    Authority.create(tmp_path, HOSTS)
    return tmp_path


@pytest.mark.parametrize(("share", "renewed"), [(0.6, False), (0.7, True), (1.1, True)])
def test_the_servers_certificate_is_renewed_in_its_last_third(
    young: Path, share: float, renewed: bool
) -> None:
    before = load_certificate(young / "server.pem")
    key = (young / "server.key").read_bytes()
    authority = Authority.load(young)
    at = NOW + share * timedelta(days=SERVER_DAYS)
    authority.keep_server_current(young, HOSTS, at)
    after = load_certificate(young / "server.pem")
    assert (after != before) == renewed
    assert (young / "server.key").read_bytes() == key  # one file changes, at once
    assert after.public_key() == before.public_key()
    assert shake_hands(*contexts(young), HOSTS[0]).version()


def test_a_new_address_is_taken_into_the_servers_certificate(young: Path) -> None:
    authority = Authority.load(young)
    authority.keep_server_current(young, ["moved.example"], NOW)
    for host in ("moved.example", *HOSTS):
        assert shake_hands(*contexts(young), host).version()


def test_an_agents_certificate_is_renewed_after_two_thirds() -> None:
    root = Issuer.new_root(path_length=0)
    issued = root.agent(Holder().key.public_key(), "kitchen-pi")
    lifetime = timedelta(days=AGENT_DAYS)
    assert not needs_renewal(issued, NOW + 0.66 * lifetime)
    assert needs_renewal(issued, NOW + 0.67 * lifetime)


@pytest.fixture
def offline(tmp_path: Path) -> tuple[Issuer, Path]:
    """A root elsewhere, and a coordinator's folder that has adopted it."""
    root = Issuer.new_root(path_length=1)
    (tmp_path / "root.pem").write_bytes(root.certificate.public_bytes(PEM))
    home = tmp_path / "home"
    home.mkdir()
    Authority.adopt(home, load_root(tmp_path / "root.pem"))
    return root, home


def test_a_coordinator_without_an_issuing_key_can_name_nobody(
    offline: tuple[Issuer, Path],
) -> None:
    _, home = offline
    authority = Authority.load(home)
    assert authority.custody is Custody.OFFLINE
    assert authority.is_offline
    assert authority_is_offline(home)
    assert not authority.can_issue(NOW)
    for issue in (authority.issue_agent, authority.issue_operator):
        with pytest.raises(ConfigError, match="expected an issuing key"):
            issue(Holder().request, "kitchen-pi")
    assert [path.name for path in home.glob("*.key")] == ["server.key"]
    with pytest.raises(ConfigError, match="ca requests, ca sign"):
        load_server_identity(home)


def install_issuing(root: Issuer, home: Path, key: Holder) -> x509.Certificate:
    issuing = root.issuing(key.key.public_key())
    pem = private_key_pem(key.key) + issuing.public_bytes(PEM)
    (home / "issuing.pem").write_bytes(pem)
    return issuing


def test_an_issuing_key_names_agents_at_once_and_is_no_offline_authority(
    offline: tuple[Issuer, Path], tmp_path: Path
) -> None:
    root, home = offline
    issuing = install_issuing(root, home, Holder())
    authority = Authority.load(home)
    assert authority.custody is Custody.ISSUING
    assert not authority.is_offline
    assert authority.can_issue(NOW)
    assert not authority.can_issue(issuing.not_valid_after_utc)
    chain = authority.issue_agent(Holder().request, "kitchen-pi")
    leaf, link = map(x509.load_der_x509_certificate, chain)
    assert link == issuing
    assert leaf.not_valid_after_utc <= issuing.not_valid_after_utc
    assert authority.certificate == root.certificate  # what devices pin stays the root


def test_an_agent_below_an_issuing_key_is_let_in_and_stays_when_it_is_replaced(
    offline: tuple[Issuer, Path], tmp_path: Path
) -> None:
    root, home = offline
    names = [x509.DNSName("localhost")]
    server_key = Holder()
    (home / "server.key").write_bytes(server_key.key_pem)
    (home / "server.pem").write_bytes(
        root.server(server_key.key.public_key(), names).public_bytes(PEM)
    )
    install_issuing(root, home, Holder())
    old = write_agent(Authority.load(home), tmp_path, "old")
    install_issuing(root, home, Holder())
    new = write_agent(Authority.load(home), tmp_path, "new")
    for agent in (old, new):
        assert shake_hands(*contexts(home, agent), "localhost").getpeercert()
    without_issuer = tmp_path / "cut.pem"
    text = new.read_text()
    without_issuer.write_text(text[: text.index("-----END CERTIFICATE-----") + 26])
    with pytest.raises(ssl.SSLError):
        shake_hands(*contexts(home, without_issuer), "localhost")


def test_an_issuing_certificate_of_another_root_is_refused(
    offline: tuple[Issuer, Path],
) -> None:
    _, home = offline
    install_issuing(Issuer.new_root(path_length=1), home, Holder())
    with pytest.raises(ConfigError, match="that the authority has signed"):
        Authority.load(home)


def test_a_root_that_brings_its_key_along_is_refused(tmp_path: Path) -> None:
    root = Issuer.new_root(path_length=1)
    path = tmp_path / "root.pem"
    path.write_bytes(private_key_pem(root.key) + root.certificate.public_bytes(PEM))
    with pytest.raises(ConfigError, match="the key stays at the root"):
        load_root(path)


def test_a_certificate_that_is_no_root_is_refused(tmp_path: Path) -> None:
    root = Issuer.new_root(path_length=1)
    path = tmp_path / "root.pem"
    for other in (root.agent(Holder().key.public_key(), "a"), root.issuing(root.key.public_key())):
        path.write_bytes(other.public_bytes(PEM))
        with pytest.raises(ConfigError):
            load_root(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError):
        load_root(path)
