"""The process that runs rounds."""

import os

# Before gRPC is imported: unasked, it says a line on stderr for every TLS handshake that fails, and
# anybody can make those fail as often as a disk has room for lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
