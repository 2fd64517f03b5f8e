"""The contract between coordinator and agents, and the little Python that both sides share."""

import os

# Read by gRPC's C core as it is imported. It writes past `fedloom.logs`, a line for each peer that
# fails a TLS handshake: anyone who can reach a port could fill a disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
