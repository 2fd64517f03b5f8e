"""Measure a coordinator under a fleet: idle connections, and rounds in which nobody trains.

    python -m benchmarks.fleet [--idle 1000,5000] [--rounds-of 100,1000]
                               [--protections plain,sealed] [--rounds 3] [--json]

The coordinator is the product's own process; agents are `benchmarks.virtual_agents`, some hundreds
in a process, each with its own TLS connection. Resident memory and CPU time are the coordinator's;
control latency is what a further agent sees from its hello to its welcome, ten times a second,
while the fleet's round is on. Machine and fleet share the cores: read the seconds accordingly.
"""

import argparse
import asyncio
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.federation import EventLog, make_plan
from benchmarks.processes import Children, Failed, exit_on_termination, free_port, run, usage
from benchmarks.virtual_agents import PARAMETERS, load_identities
from coordinator.authority import Authority
from coordinator.certificates import new_key, private_key_pem, request_for
from coordinator.services.access import public_key_sha256
from coordinator.services.limits import Limits
from coordinator.store import Store
from edge_agent.identity import Identity
from fedloom.channels import CLIENT_OPTIONS
from fedloom.v1 import control_pb2, control_pb2_grpc
from fedloom.version import PROTOCOL_VERSION

PER_PROCESS = 200
MOST_PROCESSES = 10
PROBE = "probe"
PROBE_SECONDS = 0.1
START_SECONDS = 600.0
ROUND_SECONDS = 600.0
SETTLE_SECONDS = 5.0
_COORDINATOR = str(Path(sys.executable).parent / "fedloom-coordinator")


@dataclass(frozen=True)
class Figures:
    """One case: agents 0 means a coordinator that nobody has called yet."""

    case: str
    agents: int
    rss_first_mb: float  # of the coordinator, after the first round
    rss_mb: float  # at the end
    peak_mb: float
    rss_per_agent_kb: float  # above the empty coordinator
    cpu_seconds: float  # of the coordinator, per round, or for connecting everybody
    seconds_per_round: float
    control_p50_ms: float
    control_p99_ms: float


def main() -> None:
    """Measure the cases asked for, one fresh coordinator each, and print them."""
    options = _options()
    exit_on_termination()
    status = 0
    try:
        for agents in options.idle:
            for figures in _idle(agents):
                _print(figures, options.json)
        for protection in options.protections:
            for agents in options.rounds_of:
                _print(_rounds(agents, protection, options.rounds), options.json)
    except Failed as failed:
        print(f"fleet: {failed}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _idle(agents: int) -> Iterator[Figures]:
    """Measure the coordinator, then the floor under it with the same agents."""
    with tempfile.TemporaryDirectory(prefix="fedloom-fleet-") as name, Children() as children:
        fleet = Fleet(Path(name), agents, children)
        yield fleet.idle()
        children.end()
        yield fleet.bare()


def _rounds(agents: int, protection: str, rounds: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="fedloom-fleet-") as name, Children() as children:
        return Fleet(Path(name), agents, children).rounds(protection, rounds)


class Fleet:
    """A coordinator and its enrolled agents."""

    def __init__(self, folder: Path, agents: int, children: Children) -> None:
        self._folder = folder
        self._agents = agents
        self._children = children
        self._home = folder / "coordinator"
        self._port = free_port()
        self._address = f"127.0.0.1:{self._port}"
        ports = f"--control-port={self._port}", f"--enrolment-port={free_port()}"
        addresses = "--address=127.0.0.1", "--listen=127.0.0.1"
        run([_COORDINATOR, "init", f"--home={self._home}", *addresses, *ports])
        self._permit(agents)
        names = [f"agent-{number:05}" for number in range(agents)]
        share = max(PER_PROCESS, -(-agents // MOST_PROCESSES))
        self._files = [
            self._enrol(names[start : start + share], f"fleet-{start}")
            for start in range(0, agents, share)
        ]
        self._probe = load_identities(self._enrol([PROBE], PROBE), self._address)[0]

    def idle(self) -> Figures:
        """Connect everybody and let them be."""
        return self._idle("idle", self._serve()[0])

    def bare(self) -> Figures:
        """Do the same with gRPC alone in the coordinator's place."""
        log = EventLog(self._folder / "bare.log")
        command = [sys.executable, "-m", "benchmarks.bare_streams", str(self._home)]
        pid = self._children.start([*command, str(self._port)], log.path)
        log.wait_for("serving", self._children, START_SECONDS)
        return self._idle("bare gRPC", pid)

    def rounds(self, protection: str, rounds: int) -> Figures:
        """Run rounds in which nobody trains; the first one is not counted."""
        make_plan(self._folder / "plan", PARAMETERS)
        run_file = self._folder / "run.toml"
        run_file.write_text(
            f'name = "fleet"\nplan = "plan"\nrounds = {rounds + 1}\n'
            f"[cohort]\nminimum = {self._agents}\nsize = {self._agents}\n"
            f'[protection]\nkind = "{protection}"\nclip = 0.01\n[evaluation]\nreport = "none"\n'
        )
        run([_COORDINATOR, "run", "start", str(run_file), f"--home={self._home}"])
        pid, log = self._serve()
        empty = _rss(pid)
        self._connect()
        log.wait_for("round finished", self._children, START_SECONDS)
        first = _rss(pid)
        probe = Probe(self._probe)
        before, started = usage(pid).cpu_seconds, time.monotonic()
        for _ in range(rounds):
            log.wait_for("round finished", self._children, ROUND_SECONDS)
        seconds = (time.monotonic() - started) / rounds
        cpu = (usage(pid).cpu_seconds - before) / rounds
        return self._figures(protection, pid, empty, first, cpu, seconds, probe)

    def _idle(self, case: str, pid: int) -> Figures:
        empty = _rss(pid)
        before = usage(pid).cpu_seconds
        self._connect()
        probe = Probe(self._probe)
        time.sleep(SETTLE_SECONDS)
        cpu = usage(pid).cpu_seconds - before
        return self._figures(case, pid, empty, _rss(pid), cpu, 0.0, probe)

    def _figures(
        self,
        case: str,
        pid: int,
        empty: int,
        first: int,
        cpu: float,
        seconds: float,
        probe: "Probe",
    ) -> Figures:
        latencies = probe.end()
        rss = _rss(pid)
        quantiles = statistics.quantiles(latencies, n=100)
        return Figures(
            case,
            self._agents,
            first / 1e6,
            rss / 1e6,
            usage(pid).peak_bytes / 1e6,
            (rss - empty) / self._agents / 1e3,
            cpu,
            seconds,
            1e3 * quantiles[49],
            1e3 * quantiles[98],
        )

    def _serve(self) -> tuple[int, EventLog]:
        log = EventLog(self._folder / "coordinator.log")
        command = [_COORDINATOR, "serve", f"--home={self._home}", "--json"]
        pid = self._children.start(command, log.path)
        log.wait_for("serving", self._children, START_SECONDS)
        return pid, log

    def _connect(self) -> None:
        reports = [file.with_suffix(".report") for file in self._files]
        for file, report in zip(self._files, reports, strict=True):
            report.unlink(missing_ok=True)  # of agents that were connected to something else
            command = [sys.executable, "-m", "benchmarks.virtual_agents", str(file), self._address]
            self._children.start([*command, "--report", str(report)], file.with_suffix(".log"))
        end = time.monotonic() + START_SECONDS
        while sum(_connected(report) for report in reports) < self._agents:
            self._children.check()
            if time.monotonic() > end:
                raise Failed(f"expected {self._agents} connections in {START_SECONDS:.0f} s")
            time.sleep(0.1)

    def _permit(self, agents: int) -> None:
        """Raise the limits for a fleet of this size at one address; the probe asks all the time."""
        limits = {
            "connections": 2 * agents + 64,
            "connections_per_address": 2 * agents + 64,
            "mib_in_flight": max(64, 3 * agents // 2),
            "connects_per_minute": 6000,
        }
        default = Limits()
        lines = [f"{key} = {max(value, getattr(default, key))}\n" for key, value in limits.items()]
        with (self._home / "coordinator.toml").open("a") as file:
            file.write("[limits]\n" + "".join(lines))

    def _enrol(self, names: list[str], file_name: str) -> Path:
        """Issue certificates as enrolment does, without its calls."""
        authority, store = Authority.load(self._home), Store(self._home / "store.sqlite")
        path = self._folder / f"{file_name}.jsonl"
        with path.open("w") as file:
            file.write(
                json.dumps({"authority": authority.certificate.public_bytes(Encoding.PEM).decode()})
            )
            for name in names:
                key = new_key()
                chain = _enlist(store, authority, name, request_for(key))
                certificate = x509.load_der_x509_certificate(chain[0])
                fields = {
                    "name": name,
                    "key": private_key_pem(key).decode(),
                    "certificate": certificate.public_bytes(Encoding.PEM).decode(),
                }
                file.write("\n" + json.dumps(fields))
        store.close()
        return path


def _enlist(
    store: Store, authority: Authority, name: str, request: x509.CertificateSigningRequest
) -> tuple[bytes, ...]:
    secret, digest = hashlib.sha256(name.encode()).digest(), public_key_sha256(request)
    roster, now = store.roster, time.time()
    roster.add_invitation(secret, name, now + 3600)
    roster.redeem(secret, digest, request.public_bytes(Encoding.DER), now)
    chain = authority.issue_agent(request, name)
    roster.grant(name, digest, chain, now)
    return chain


class Probe:
    """One more agent, in a thread, that asks for a welcome again and again."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._ending = threading.Event()
        self._latencies: list[float] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))
        self._thread.start()

    def end(self) -> list[float]:
        """Return the seconds from each hello to its welcome."""
        self._ending.set()
        self._thread.join()
        return self._latencies

    async def _ask(self) -> None:
        address = self._identity.control_address
        credentials = self._identity.channel_credentials()
        hello = control_pb2.Hello(protocol_version=PROTOCOL_VERSION)
        async with grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            while not self._ending.is_set():
                call = stub.Connect()
                started = time.perf_counter()
                await call.write(control_pb2.ConnectRequest(hello=hello))
                await call.read()
                self._latencies.append(time.perf_counter() - started)
                call.cancel()
                await asyncio.sleep(PROBE_SECONDS)


def _rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kibibytes) * 1024


def _connected(report: Path) -> int:
    try:
        return int(json.loads(report.read_text())["connected"])
    except (OSError, ValueError):
        return 0


def _print(figures: Figures, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(figures)), flush=True)
        return
    f = figures
    print(
        f"{f.case:9} {f.agents:6} agents  "
        f"RSS {f.rss_first_mb:6.1f} -> {f.rss_mb:6.1f} MB, peak {f.peak_mb:6.1f} "
        f"({f.rss_per_agent_kb:5.1f} kB each)  "
        f"CPU {f.cpu_seconds:7.2f} s  round {f.seconds_per_round:7.2f} s  "
        f"control p50 {f.control_p50_ms:6.1f} ms  p99 {f.control_p99_ms:6.1f} ms",
        flush=True,
    )


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",") if item]

    parser = argparse.ArgumentParser(description="Measure a coordinator under a fleet.")
    parser.add_argument("--idle", type=numbers, default=[1000, 5000])
    parser.add_argument("--rounds-of", type=numbers, default=[100, 1000])
    parser.add_argument(
        "--protections", type=lambda text: text.split(","), default=["plain", "sealed"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
