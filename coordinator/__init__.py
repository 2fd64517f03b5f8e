"""The process that runs rounds."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulation.learning import FederatedLearning as FederatedLearning

# Before gRPC is imported: unasked, it says a line on stderr for every TLS handshake that fails, and
# anybody can make those fail as often as a disk has room for lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def __getattr__(name: str) -> Any:
    """Give `FederatedLearning`, the name that users type, from the package above this one."""
    if name == "FederatedLearning":
        from simulation.learning import FederatedLearning

        return FederatedLearning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
