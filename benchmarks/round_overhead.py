"""Measure what a round costs when training costs nothing.

    python benchmarks/round_overhead.py [--json] [--quick] [--parameters 100000,1000000,10000000]
                                        [--agents 2,8] [--protections plain,encrypted] [--rounds 10]

Every case is the product as a user runs it: one coordinator process and K agent processes on
loopback, mutual TLS, spool, SQLite and published sums included. Only the engine is replaced: its
`train` returns a constant update. Beside it stands gRPC that moves the same bytes. README.md says
what each column is. Nothing passes or fails: the figures depend on the machine.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from benchmarks import bare_grpc
from benchmarks.federation import Federation
from benchmarks.figures import Case, Figures
from benchmarks.processes import Failed, exit_on_termination
from benchmarks.report import print_report
from fedloom.terms import Protection

QUICK = {"parameters": [100_000], "agents": [2], "rounds": 3}
_T = TypeVar("_T")


def main() -> None:
    """Measure the cases asked for and print them."""
    options = _options()
    exit_on_termination()
    figures: list[Figures] = []
    status = 0
    try:
        figures.extend(_measure(list(_cases(options))))  # keeps what was measured before a failure
    except Failed as failed:
        print(f"round_overhead: {failed}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    if options.json:
        print(json.dumps([one.to_json() for one in figures]))
    elif figures:
        print_report(figures)
    sys.exit(status)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for parameters in options.parameters:
        for agents in options.agents:
            for protection in options.protections:
                yield Case(parameters, agents, protection, options.rounds)


def _measure(cases: list[Case]) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as name:
        folder = Path(name)
        federation = Federation(folder, max(case.agents for case in cases))
        for number, case in enumerate(cases, 1):
            progress = f"[{number}/{len(cases)}] {case.parameters:,} parameters, "
            progress += f"{case.agents} agents, {case.protection}"
            print(progress, file=sys.stderr, flush=True)
            yield _measure_case(federation, case, folder / "case")


def _measure_case(federation: Federation, case: Case, folder: Path) -> Figures:
    product = federation.measure(case, folder)
    volume = product.bytes_up, product.bytes_down
    return Figures(
        case,
        product,
        bare_grpc.measure(federation, folder, case.agents, volume, case.rounds),
        bare_grpc.measure_insecure(folder, case.agents, volume, case.rounds),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what a round costs when training costs nothing."
    )
    numbers = _listed(_positive)
    protections = [kind.name.lower() for kind in Protection]
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--quick", action="store_true", help="one small case per protection")
    parser.add_argument("--parameters", type=numbers, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--agents", type=numbers, default=[2, 8], help="processes")
    parser.add_argument("--protections", type=_listed(_one_of(protections)), default=protections)
    parser.add_argument("--rounds", type=_positive, default=10, help="measured, after a warm-up")
    quick, _ = parser.parse_known_args()
    if quick.quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def _listed(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    return lambda text: [kind(item) for item in text.split(",")]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def _one_of(names: list[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {names}, found {text!r}")
        return text

    return check


if __name__ == "__main__":
    main()
