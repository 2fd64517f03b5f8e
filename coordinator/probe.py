"""Ask a coordinator whether it takes work: `python -m coordinator.probe localhost:7072 FILE`.

For container health checks and orchestrators, whose own gRPC probes speak no TLS. FILE is the
authority's certificate (`authority.pem`); the port is that of enrolment, which asks for none.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROBE_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when it serves, 1 when it does not or cannot be reached."""
    options = parser().parse_args(arguments)
    try:
        status = _status(options.address, options.authority.read_bytes(), options.service)
    except grpc.RpcError as error:
        sys.stdout.write(f"{error.code().name}: {error.details()}\n")
        return 1
    except OSError as error:
        sys.stdout.write(f"{options.authority}: expected a certificate ({error.strerror})\n")
        return 1
    sys.stdout.write(f"{health_pb2.HealthCheckResponse.ServingStatus.Name(status)}\n")
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


def parser() -> argparse.ArgumentParser:
    """Return what the command line may say."""
    found = argparse.ArgumentParser(prog="coordinator.probe")
    found.add_argument("address", help="host:port of the enrolment port")
    found.add_argument("authority", type=Path, help="the authority's certificate, PEM")
    found.add_argument("--service", default="", help="full name of a service; default: all")
    return found


def _status(address: str, authority: bytes, service: str) -> int:
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority)) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service=service)
        return int(check(request, timeout=PROBE_SECONDS).status)


if __name__ == "__main__":
    sys.exit(main())
