"""Signing offline: files go there and back, and neither side believes more than it can see."""

import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from typer.testing import CliRunner, Result

from coordinator.app import app
from coordinator.authority import Authority, Custody, load_certificate
from coordinator.certificates import (
    ISSUING_DAYS,
    SERVER_DAYS,
    alternative_name,
    request_for,
)
from coordinator.premises import open_store
from coordinator.roster import Roster
from coordinator.roster_records import CertificateRequest
from coordinator.signing import Root, Standing, collect_requests
from coordinator.signing_files import Kind, SigningRequest
from fedloom.errors import ConfigError, Refused
from fedloom.renewals import sign_renewal
from tests.coordinator.holders import DER, PEM, Holder

SECRET = bytes(32)


def ca(*arguments: str | Path, answer: str = "") -> Result:
    """Type a command; its errors are raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Site:
    """A root on one machine, a coordinator on another, and a stick between them."""

    def __init__(self, folder: Path, strict: bool = False) -> None:
        self.root = folder / "offline"
        self.home = folder / "coordinator"
        self.stick = folder / "certificates.json"
        ca("ca", "create", self.root, *(["--strict"] if strict else []))
        carried = folder / "root.pem"
        carried.write_bytes((self.root / "root.pem").read_bytes())
        ca("init", "--home", self.home, "--address", "c.example", "--authority", carried)

    @property
    def requests(self) -> Path:
        """The file that `init` and `ca requests` write."""
        return self.home / "requests.json"

    def sign(self, *options: str, answer: str = "y\n") -> Result:
        """Sign at the root."""
        arguments = (self.root, self.requests, "--out", self.stick, *options)
        return ca("ca", "sign", *arguments, answer=answer)

    def install(self) -> str:
        """Bring the certificates back."""
        return ca("ca", "install", self.stick, "--home", self.home).stdout

    def collect(self, *options: str) -> str:
        """Write the requests anew."""
        return ca("ca", "requests", "--home", self.home, *options).stdout

    def roster(self) -> Roster:
        """Return what the coordinator remembers."""
        return open_store(self.home).roster

    def redeem(self, device: Holder, name: str, secret: bytes = SECRET) -> CertificateRequest:
        """Let a device ask with a token."""
        self.roster().add_invitation(secret, name, 10.0)
        return self.roster().redeem(secret, device.digest, device.request_der, 5.0)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_coordinator_is_set_up_without_the_roots_key(site: Site) -> None:
    shown = site.sign().stdout
    assert "c.example, localhost" in shown
    assert "not signed" in shown  # the issuing key
    site.install()
    authority = Authority.load(site.home)
    assert authority.custody is Custody.OFFLINE
    load_certificate(site.home / "server.pem").verify_directly_issued_by(authority.certificate)
    key = (site.root / "root.key").read_bytes()
    assert stat.S_IMODE((site.root / "root.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(site.root.stat().st_mode) == 0o700
    travelled = [path for path in site.home.rglob("*") if path.is_file()]
    travelled += [site.stick, site.root / "issued.jsonl"]
    secret = key.splitlines()[1]
    assert not [path for path in travelled if secret in path.read_bytes()]
    for path in (site.requests, site.stick):
        assert b"PRIVATE" not in path.read_bytes()


def test_a_device_joins_through_the_root(site: Site) -> None:
    device = Holder()
    assert site.redeem(device, "kitchen-pi").chain == ()
    collected = site.collect()
    assert device.digest.hex() in collected
    signed = site.sign().stdout
    assert "kitchen-pi" in signed
    assert device.digest.hex() in signed
    assert Standing.NEW.value in signed
    assert "kitchen-pi: the device can finish joining" in site.install()
    answer = site.roster().redeem(SECRET, device.digest, device.request_der, 99.0)
    assert len(answer.chain) == 1
    site.roster().require_member("kitchen-pi", device.digest)
    assert "nothing waits" in site.install()  # a repeat changes nothing


def test_an_issuing_certificate_is_installed_and_replaced(site: Site) -> None:
    site.sign("--issuing")
    site.install()
    first = Authority.load(site.home)
    assert first.custody is Custody.ISSUING
    assert stat.S_IMODE((site.home / "issuing.pem").stat().st_mode) == 0o600
    assert not (site.home / "issuing.key").exists()
    assert "nothing waits" in site.collect()
    site.collect("--renew")
    assert Authority.load(site.home).custody is Custody.ISSUING  # while another one is asked for
    site.sign("--issuing")
    site.install()
    chains = [
        authority.issue_agent(Holder().request, "a")
        for authority in (first, Authority.load(site.home))
    ]
    assert chains[0][1] != chains[1][1]


def test_a_strict_root_signs_no_issuing_key(tmp_path: Path) -> None:
    site = Site(tmp_path, strict=True)
    kinds = [row["kind"] for row in json.loads(site.requests.read_text())["requests"]]
    assert kinds == ["server"]
    root = Root.load(site.root)
    with pytest.raises(ConfigError, match="strict root"):
        root.sign(SigningRequest(Kind.ISSUING, "c.example", Holder().request))


def test_nothing_is_signed_without_a_yes(site: Site) -> None:
    result = site.sign(answer="n\n")
    assert result.exit_code != 0
    assert not site.stick.exists()
    assert not (site.root / "issued.jsonl").exists()


def test_a_name_that_had_another_key_is_shown_and_not_signed_unasked(site: Site) -> None:
    site.redeem(Holder(), "kitchen-pi")
    site.collect()
    site.sign()
    site.install()
    thief = Holder()
    site.redeem(thief, "kitchen-pi", secret=bytes([1]) * 32)
    site.redeem(Holder(), "hall-pi", secret=bytes([2]) * 32)
    site.collect()
    shown = site.sign("--yes", answer="").stdout
    assert Standing.OTHER.value in shown
    assert "left out" in shown
    assert "kitchen-pi" not in site.install()
    with pytest.raises(Refused):
        site.roster().require_member("kitchen-pi", thief.digest)
    assert Standing.OTHER.value in site.sign().stdout  # a person may know better
    site.install()
    site.roster().require_member("kitchen-pi", thief.digest)


def test_the_root_sees_whether_the_old_key_vouches_for_a_new_one(tmp_path: Path) -> None:
    root = Root.create(tmp_path / "root", strict=True)
    old, new = Holder(), Holder()
    request = new.request
    vouched = sign_renewal(old.key, request.public_bytes(DER))
    claimed = sign_renewal(new.key, request.public_bytes(DER))

    def asked(
        request: x509.CertificateSigningRequest, signature: bytes = b"", kind: Kind = Kind.AGENT
    ) -> SigningRequest:
        return SigningRequest(kind, "kitchen-pi", request, signature)

    assert root.standing(asked(old.request)) is Standing.NEW
    root.sign(asked(old.request))
    for reader in (root, Root.load(tmp_path / "root")):
        assert reader.standing(asked(old.request)) is Standing.SAME
        assert reader.standing(asked(request, vouched)) is Standing.VOUCHED
        assert reader.standing(asked(new.request, vouched)) is Standing.OTHER  # another request
        for signature in (claimed, b"garbage", b""):
            assert reader.standing(asked(request, signature)) is Standing.OTHER
        assert reader.standing(asked(request, kind=Kind.SERVER)) is Standing.NEW


Change = Callable[[dict[str, Any]], None]


def setting(kind: str, field: str, value: Any) -> Change:
    def change(table: dict[str, Any]) -> None:
        for row in table["requests"]:
            if row["kind"] == kind:
                row[field] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        setting("agent", "name", "../kitchen"),
        setting("agent", "name", "kitchen\x1b[2J"),
        setting("agent", "name", 7),
        setting("agent", "kind", "operator"),
        setting("agent", "request", "garbage"),
        setting("agent", "request", None),
        setting("agent", "former_key_signature", "zz"),
        setting("server", "name", "a\nb"),
        lambda table: table.pop("requests"),
        lambda table: table.update(requests={}),
        lambda table: table.update(requests=["x"]),
        lambda table: table.update(authority_key_sha256="00"),
    ],
)
def test_a_file_of_requests_that_is_none_signs_nothing(site: Site, change: Change) -> None:
    site.redeem(Holder(), "kitchen-pi")
    site.collect()
    table = json.loads(site.requests.read_text())
    change(table)
    site.requests.write_text(json.dumps(table))
    with pytest.raises(ConfigError):
        site.sign("--yes")
    assert not site.stick.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"requests": []}'])
def test_a_file_of_anything_else_is_a_config_error(site: Site, text: str) -> None:
    for path, command in ((site.requests, site.sign), (site.stick, site.install)):
        path.write_text(text)
        with pytest.raises(ConfigError):
            command()


def test_certificates_that_the_root_did_not_sign_are_not_installed(
    site: Site, tmp_path: Path
) -> None:
    device = Holder()
    site.redeem(device, "kitchen-pi")
    site.collect()
    forger = Root.create(tmp_path / "forger", strict=False)
    forged = forger.sign(SigningRequest(Kind.AGENT, "kitchen-pi", device.request))
    site.sign()
    table = json.loads(site.stick.read_text())
    for row in table["certificates"]:
        row["certificate"] = forged.certificate.public_bytes(PEM).decode()
    site.stick.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="that the authority has signed"):
        site.install()
    assert site.roster().agents() == []


@pytest.mark.parametrize("kind", ["server", "issuing"])
def test_a_certificate_of_another_kind_or_key_is_not_installed(site: Site, kind: str) -> None:
    device = Holder()
    site.redeem(device, "kitchen-pi")
    site.collect()
    site.sign("--issuing")
    table = json.loads(site.stick.read_text())
    agent = next(row for row in table["certificates"] if row["kind"] == "agent")
    table["certificates"] = [agent | {"kind": kind}]
    site.stick.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=f"{kind} .*expected a certificate for"):
        site.install()
    request = request_for(device.key, [alternative_name("c.example")])
    server = Root.load(site.root).sign(SigningRequest(Kind.SERVER, "x", request))
    row = {"name": "kitchen-pi", "certificate": server.certificate.public_bytes(PEM).decode()}
    table["certificates"] = [row | {"kind": "agent"}]
    site.stick.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="agent kitchen-pi"):
        site.install()
    assert site.roster().agents() == []


def test_a_coordinator_with_its_own_authority_has_nothing_to_sign(tmp_path: Path) -> None:
    ca("init", "--home", tmp_path / "home")
    with pytest.raises(ConfigError, match="nothing to be signed"):
        ca("ca", "requests", "--home", tmp_path / "home")


def test_a_root_on_a_coordinators_machine_is_warned_of(tmp_path: Path) -> None:
    ca("init", "--home", tmp_path / "home")
    result = ca("ca", "create", tmp_path / "home" / "root")
    assert "can make up members" in result.stderr
    carried = tmp_path / "home" / "root" / "root.pem"
    result = ca("init", "--home", tmp_path / "other", "--authority", carried)
    assert "can make up members" in result.stderr
    with pytest.raises(ConfigError, match="has an authority already"):
        ca("ca", "create", tmp_path / "home" / "root")


def test_certificates_that_are_good_are_not_asked_for_again(site: Site) -> None:
    def kinds(now: datetime) -> list[Kind]:
        return [r.kind for r in collect_requests(site.home, "c.example", site.roster(), now)]

    site.sign("--issuing")
    site.install()
    now = datetime.now(UTC)
    assert kinds(now) == []
    assert kinds(now + 0.68 * timedelta(days=ISSUING_DAYS)) == [Kind.ISSUING]
    assert kinds(now + 0.68 * timedelta(days=SERVER_DAYS)) == [Kind.SERVER, Kind.ISSUING]
