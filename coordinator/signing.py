"""What an offline root signs: requests out of a coordinator's folder, certificates back into it.

The root believes nothing of a request but what it can see itself: that it is signed by its own key,
and, from the list of what was signed before, who held the name.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from coordinator.audit import Action
from coordinator.authority import (
    ISSUING_FILE,
    ISSUING_KEY_FILE,
    SERVER_FILE,
    SERVER_KEY_FILE,
    Authority,
    key_fingerprint,
    load_certificate,
    load_key,
    require_issued,
    server_names,
)
from coordinator.certificates import Issuer, alternative_name, new_key, private_key_pem, request_for
from coordinator.roster import Grant, Roster
from coordinator.signing_files import Granted, Kind, SigningRequest
from fedloom.chains import (
    AGENT_ROLE,
    Subject,
    UntrustedChain,
    needs_renewal,
    public_key_bytes,
    subject_of,
    verified_client,
)
from fedloom.errors import ConfigError
from fedloom.renewals import check_renewal
from fedloom.secret_files import make_private_folder, write_secret

ROOT_FILE = "root.pem"
ROOT_KEY_FILE = "root.key"
ISSUED_FILE = "issued.jsonl"  # what the root has signed: a line for each, oldest first
_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER


class Standing(Enum):
    """What the root knows of a key that asks for a name."""

    NEW = "new: compare the key with what is shown where it was made"
    SAME = "known: the same key as before"
    VOUCHED = "renewal: the key before has signed for this one"
    OTHER = "ANOTHER KEY than before: is this the same device?"


class Root:
    """An authority's key on a machine of its own, with a list of what it has signed."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        self._folder = folder
        self._issuer = issuer
        self.certificate = issuer.certificate
        self._holders: dict[tuple[str, str], x509.Certificate] = {}  # (kind, name), the last one's
        path = folder / ISSUED_FILE
        for line in path.read_text().splitlines() if path.exists() else ():
            signed = json.loads(line)
            certificate = x509.load_der_x509_certificate(base64.b64decode(signed["der"]))
            self._holders[signed["kind"], signed["name"]] = certificate

    @classmethod
    def create(cls, folder: Path, strict: bool) -> "Root":
        """Make the root; a strict one can never have an issuing certificate below it."""
        if (folder / ROOT_FILE).exists():
            raise ConfigError(str(folder), "has an authority already; choose another folder")
        make_private_folder(folder)
        root = Issuer.new_root(path_length=0 if strict else 1)
        write_secret(folder / ROOT_KEY_FILE, private_key_pem(root.key))
        write_secret(folder / ROOT_FILE, root.certificate.public_bytes(_PEM))
        return cls(folder, root)

    @classmethod
    def load(cls, folder: Path) -> "Root":
        """Read the root of a folder."""
        certificate = load_certificate(folder / ROOT_FILE)
        return cls(folder, Issuer(certificate, load_key(folder / ROOT_KEY_FILE)))

    def standing(self, request: SigningRequest) -> Standing:
        """Say what is known of the key that asks for this name."""
        holder = self._holders.get((request.kind.value, request.name))
        if holder is None or request.kind is Kind.ISSUING:  # whose every request is for a new key
            return Standing.NEW
        if public_key_bytes(holder) == public_key_bytes(request.request):
            return Standing.SAME
        try:
            der = request.request.public_bytes(_DER)
            check_renewal(holder.public_key(), der, request.former_key_signature)
        except InvalidSignature:
            return Standing.OTHER
        return Standing.VOUCHED

    def sign(self, request: SigningRequest) -> Granted:
        """Sign, and remember it; raises ConfigError for an issuing request below a strict root."""
        key = request.request.public_key()
        match request.kind:
            case Kind.SERVER:
                certificate = self._issuer.server(
                    key, [alternative_name(h) for h in request.alternatives]
                )
            case Kind.ISSUING:
                if _path_length(self.certificate) == 0:
                    raise ConfigError(
                        "--issuing", "a strict root can have no issuing certificate below it"
                    )
                certificate = self._issuer.issuing(key)
            case Kind.AGENT:
                certificate = self._issuer.agent(key, request.name)
        der = base64.b64encode(certificate.public_bytes(_DER)).decode()
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"at": at, "kind": request.kind.value, "name": request.name, "der": der}
        with (self._folder / ISSUED_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._holders[request.kind.value, request.name] = certificate
        return Granted(request.kind, request.name, certificate)


def collect_requests(
    home: Path, address: str, roster: Roster, now: datetime, renew: bool = False
) -> list[SigningRequest]:
    """Return what this coordinator wants signed: server, issuing key, agents that wait.

    Server and issuing key only when what they have is missing or ends soon, or with `renew`.
    """
    found = []
    if renew or not _is_good(home / SERVER_FILE, now):
        request = request_for(load_key(home / SERVER_KEY_FILE), server_names([address]))
        found.append(SigningRequest(Kind.SERVER, address, request))
    strict = _path_length(Authority.load(home).certificate) == 0
    if not strict and (renew or not _is_good(home / ISSUING_FILE, now)):
        if not (home / ISSUING_KEY_FILE).exists():
            write_secret(home / ISSUING_KEY_FILE, private_key_pem(new_key()))
        request = request_for(load_key(home / ISSUING_KEY_FILE))
        found.append(SigningRequest(Kind.ISSUING, address, request))
    for asked in roster.pending():
        request = x509.load_der_x509_csr(asked.request)
        found.append(
            SigningRequest(Kind.AGENT, asked.agent_id, request, asked.former_key_signature)
        )
    return found


def _is_good(path: Path, now: datetime) -> bool:
    return path.exists() and not needs_renewal(load_certificate(path), now)


@dataclass(frozen=True)
class Outcome:
    """What came of a certificate that was brought back."""

    text: str
    action: Action | None = None  # what the audit log should say; None: nothing was changed


def install(
    home: Path, roster: Roster, granted: Sequence[Granted], now: float
) -> Iterator[tuple[Granted, Outcome]]:
    """Take over what the root has signed, one after another."""
    authority = Authority.load(home).certificate
    for one in granted:
        require_issued(one.certificate, authority, f"{one.kind.value} {one.name}")
        match one.kind:
            case Kind.SERVER:
                yield one, _install_server(home, one)
            case Kind.ISSUING:
                yield one, _install_issuing(home, one)
            case Kind.AGENT:
                yield one, _install_agent(roster, authority, one, now)


def _install_server(home: Path, one: Granted) -> Outcome:
    if one.certificate.public_key() != load_key(home / SERVER_KEY_FILE).public_key():
        raise ConfigError(f"server {one.name}", "expected a certificate for this server's key")
    write_secret(home / SERVER_FILE, one.certificate.public_bytes(_PEM))
    text = "server certificate installed; it is shown from the next start of `serve`"
    return Outcome(text, Action.CERTIFICATE_ISSUED)


def _install_issuing(home: Path, one: Granted) -> Outcome:
    path = home / ISSUING_KEY_FILE
    if not path.exists():
        return Outcome("issuing certificate is there already")
    key = load_key(path)
    if one.certificate.public_key() != key.public_key():
        raise ConfigError(f"issuing {one.name}", "expected a certificate for the issuing key")
    # Key and certificate in one file: they are replaced together or not at all.
    write_secret(home / ISSUING_FILE, private_key_pem(key) + one.certificate.public_bytes(_PEM))
    path.unlink()
    text = "issuing certificate installed; devices are enrolled at once from the next start"
    return Outcome(text, Action.AUTHORITY_CHANGED)


def _install_agent(
    roster: Roster, authority: x509.Certificate, one: Granted, now: float
) -> Outcome:
    chain = (one.certificate.public_bytes(_DER),)
    try:
        certificate = verified_client(chain, authority, datetime.now(UTC))
    except UntrustedChain as error:
        raise ConfigError(f"agent {one.name}", error.problem) from error
    if subject_of(certificate) != Subject(one.name, AGENT_ROLE):
        raise ConfigError(f"agent {one.name}", "expected a certificate in this agent's name")
    key = bytes.fromhex(key_fingerprint(certificate))
    granted = roster.grant(one.name, key, chain, now)
    if granted is None:
        return Outcome(f"{one.name}: nothing waits for this certificate (any more)")
    if granted is Grant.RENEWED:
        return Outcome(f"{one.name}: the device can renew", Action.CERTIFICATE_ISSUED)
    return Outcome(f"{one.name}: the device can finish joining", Action.AGENT_ENROLLED)


def _path_length(authority: x509.Certificate) -> int | None:
    return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
