"""A device that has joined, without a coordinator."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization

from coordinator.certificates import Issuer
from edge_agent.identity import Identity, joining_key, save_membership


def joined(home: Path, name: str = "kitchen-pi") -> Identity:
    """Make the home of a device that an authority has named."""
    root = Issuer.new_root(path_length=1)
    key = joining_key(home)
    certificate = root.agent(key.public_key(), name)
    chain = (certificate.public_bytes(serialization.Encoding.DER),)
    return save_membership(home, key, chain, root.certificate, "127.0.0.1:7070")
