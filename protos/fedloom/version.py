"""Versions: of the software, and of the meaning of the protocol.

`PROTOCOL_VERSION` rises with every change of meaning; the package `fedloom.v1` changes only when
messages cannot be read any more. History:

1  2026-11-20  first version
2  2026-11-20  run keys rotate, the cohort states its clip, rounds may be void, sums may be returned
3  2026-11-20  strategies whose updates have a length of their own, weights, schedules, local steps
4  2026-11-20  updates that hold parts of theta, models of a device's own; how quality is reported
               is a term of the run, and it may be summed with the updates
"""

from importlib.metadata import version

PROTOCOL_VERSION = 4
OLDEST_SERVED_PROTOCOL = 4  # the coordinator serves OLDEST_SERVED_PROTOCOL..PROTOCOL_VERSION

# Of the operator's service, with every change of its meaning: both sides come from one release.
# 1  2026-11-20  first version
ADMIN_VERSION = 1


def software() -> str:
    """Name and version of this distribution, as sent in Hello."""
    return f"fedloom {version('fedloom')}"
