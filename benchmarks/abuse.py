"""Measure what attacks cost a coordinator, and what its good agents notice of them.

    python benchmarks/abuse.py [--joins 100000] [--connections 1000] [--seconds 30] [--json]

One coordinator process as a user runs it, three agents whose rounds cost nothing (`plain`, 10,000
parameters), a fourth that measures how fast it is answered (`probe.py`), and attackers in a process
of their own (`attackers.py`): bogus joins, slowloris, TLS handshakes, one after another, with a
quiet time before and after. README.md says what each column is. Nothing passes or fails; attackers,
agents and coordinator share the machine's cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.federation import EventLog, Federation, make_plan
from benchmarks.figures import MEGABYTE
from benchmarks.processes import Children, Failed, exit_on_termination, run, usage
from coordinator.premises import load_server_config

AGENTS = 3
PARAMETERS = 10_000
START_SECONDS = 60.0
QUIET_SECONDS = 10
_RUN = f'name = "abuse"\nplan = "plan"\nrounds = 100000\n[cohort]\nminimum = {AGENTS}\n'
_RUN += '[protection]\nkind = "plain"\n'
_COORDINATOR = str(Path(sys.executable).parent / "fedloom-coordinator")


@dataclass(frozen=True)
class Figures:
    """One attack."""

    attack: str
    seconds: float
    did: str  # the attacker's own account
    before_bytes: int  # resident memory of the coordinator
    peak_bytes: int
    after_bytes: int
    cpu_seconds: float
    echoes: list[float]  # milliseconds
    connects: list[float]
    refused: int  # connections of the good agent that failed
    rounds: int


class Bench:
    """A coordinator, its agents and the probe, running."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder = folder
        self.children = children
        self.federation = Federation(folder, AGENTS + 2)
        self.config = load_server_config(self.federation.coordinator)
        make_plan(folder / "plan", PARAMETERS)
        (folder / "run.toml").write_text(_RUN)
        home = self.federation.coordinator
        run_id = run([_COORDINATOR, "run", "start", str(folder / "run.toml"), f"--home={home}"])
        self.log = EventLog(folder / "coordinator.log")
        self.pid = children.start(
            [_COORDINATOR, "serve", f"--home={home}", "--json"], self.log.path
        )
        self.log.wait_for("serving", children, START_SECONDS)
        *agents, echoing, connecting = self.federation.homes
        for agent in agents:
            command = [sys.executable, "-m", "benchmarks.constant_agent", str(agent), "plain"]
            children.start(command, agent.with_suffix(".log"))
        self.log.wait_for("round finished", children, START_SECONDS)
        probe = [sys.executable, "-m", "benchmarks.probe", str(echoing), str(connecting), run_id]
        children.start(probe, folder / "probe.log")

    def measure(self, name: str, attack: list[str] | None) -> Figures:
        """Attack, or wait for a while, and see what happens to the others."""
        before, began = self._memory("VmRSS"), time.time()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # the peak counts from here
        cpu = usage(self.pid).cpu_seconds
        did = ""
        if attack is None:
            time.sleep(QUIET_SECONDS)
        else:
            did = run([sys.executable, "-m", "benchmarks.attackers", *attack])
        ended = time.time()
        used = usage(self.pid)
        self.children.check()
        lines = [line.split() for line in (self.folder / "probe.log").read_text().splitlines()]
        within = [line for line in lines if began <= float(line[0]) <= ended]
        self.log.read()
        rounds = sum(began <= at <= ended for at in self.log.moments("round finished"))
        return Figures(
            attack=name,
            seconds=ended - began,
            did=did,
            before_bytes=before,
            peak_bytes=used.peak_bytes,
            after_bytes=self._memory("VmRSS"),
            cpu_seconds=used.cpu_seconds - cpu,
            echoes=[float(ms) for _, what, ms in within if what == "echo"],
            connects=[float(ms) for _, what, ms in within if what == "connect"],
            refused=sum(what == "refused" for _, what, _ in within),
            rounds=rounds,
        )

    def _memory(self, key: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith(key))
        return int(kilobytes) * 1024


def main() -> None:
    """Attack and print."""
    options = _options()
    exit_on_termination()
    figures: list[Figures] = []
    try:
        with tempfile.TemporaryDirectory(prefix="fedloom-abuse-") as name, Children() as children:
            bench = Bench(Path(name), children)
            control, enrolment = bench.config.control_port, bench.config.enrolment_port
            for attack, arguments in (
                ("none", None),
                ("joins", ["joins", enrolment, options.joins, 256]),
                ("slowloris", ["slowloris", control, options.seconds, options.connections]),
                ("slowloris, enrolment", ["slowloris", enrolment, options.seconds, 1000]),
                ("handshakes", ["handshakes", control, options.seconds, 50]),
                ("handshakes, enrolment", ["handshakes", enrolment, options.seconds, 50]),
                ("none, after", None),
            ):
                print(f"{attack} ...", file=sys.stderr, flush=True)
                command = None if arguments is None else [str(value) for value in arguments]
                figures.append(bench.measure(attack, command))
    except Failed as failed:
        print(f"abuse: {failed}", file=sys.stderr)
        sys.exit(1)
    finally:
        print(json.dumps([asdict(one) for one in figures]) if options.json else table(figures))


def table(figures: list[Figures]) -> str:
    """Return the figures as Markdown."""
    heading = (
        "| attack | s | RSS MB before → peak → after | CPU s | echo ms p50 / p99 / max |"
        " connect ms p50 / max (n, failed) | rounds, per s | attacker |"
    )
    lines = [heading, "|---|---:|---:|---:|---:|---:|---:|---|"]
    for one in figures:
        memory = " → ".join(
            f"{count / MEGABYTE:.0f}"
            for count in (one.before_bytes, one.peak_bytes, one.after_bytes)
        )
        lines.append(
            f"| {one.attack} | {one.seconds:.0f} | {memory} | {one.cpu_seconds:.1f} "
            f"| {_quantiles(one.echoes)} | {_connects(one)} "
            f"| {one.rounds}, {one.rounds / one.seconds:.1f} | {one.did} |"
        )
    return "\n".join(lines)


def _quantiles(values: list[float]) -> str:
    if len(values) < 2:
        return "none"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"{cuts[49]:.1f} / {cuts[98]:.1f} / {max(values):.0f}"


def _connects(one: Figures) -> str:
    if not one.connects:
        return f"none (0, {one.refused})"
    median, longest = statistics.median(one.connects), max(one.connects)
    return f"{median:.0f} / {longest:.0f} ({len(one.connects)}, {one.refused})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what attacks cost a coordinator.")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--joins", type=int, default=100_000, help="bogus ones")
    parser.add_argument("--connections", type=int, default=1000, help="of slowloris")
    parser.add_argument("--seconds", type=int, default=30, help="of slowloris and handshakes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
