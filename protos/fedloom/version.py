"""Versions: of the software, and of the meaning of the protocol.

`PROTOCOL_VERSION` rises with every change of meaning; the package `fedloom.v1` changes only when
messages cannot be read any more. History:

1  2026-11-20  first version
"""

from importlib.metadata import version

PROTOCOL_VERSION = 1
OLDEST_SERVED_PROTOCOL = 1  # the coordinator serves OLDEST_SERVED_PROTOCOL..PROTOCOL_VERSION


def software() -> str:
    """Name and version of this distribution, as sent in Hello."""
    return f"fedloom {version('fedloom')}"
