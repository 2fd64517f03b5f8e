"""Train federated, centralised and alone on public data, and write what each reaches.

    python -m examples.headline [--cases banking77 mnist] [--data-root PATH] [--quick]

Cases whose data are not there are skipped. Results are kept in the output folder by case and
training; what is there for the same settings is not trained again.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import structlog

from examples.headline.cases import CASES, Case
from examples.headline.comparison import Compared, compare, quickened
from examples.headline.table import table

_BESIDE = Path(__file__).parents[3] / "shared"  # data beside the project, where there are any


def main() -> int:
    """Run the cases that were asked for; return the process's status."""
    options = _options()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(40),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    chosen = [case for case in CASES if not options.cases or case.name in options.cases]
    models = options.models_root or options.data_root.parent / "models"
    done: list[Compared] = []
    for case in chosen:
        if missing := _missing(case, options.data_root, models):
            print(f"{case.name}: skipped, for there is no {missing}", file=sys.stderr)
            continue
        limited = replace(case, most_rows=options.rows) if options.rows else case
        asked = quickened(limited) if options.quick else limited
        done.append(compare(asked, options.data_root, models, options.out, _report))
    if not done:
        print("no case was run: name the folder of the data by --data-root", file=sys.stderr)
        return 0
    text = table(done)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text)
    print(text)
    _draw(done, options.out / "headline.png")
    return 0


def _missing(case: Case, data: Path, models: Path) -> Path | None:
    needed = [data / case.data] + ([models / case.model] if case.model else [])
    return next((path for path in needed if not path.exists()), None)


def _draw(done: list[Compared], path: Path) -> None:
    try:
        from examples.headline.plots import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('no plots: matplotlib comes with pip install "fedloom[headline]"', file=sys.stderr)
        return
    draw(done, path)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.headline",
        description="Compare federated with centralised and local-only training.",
    )
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, help="which cases; all unless named")
    parser.add_argument("--data-root", type=Path, default=_BESIDE / "data", help="the data sets")
    parser.add_argument("--models-root", type=Path, help="default: models beside the data root")
    parser.add_argument("--out", type=Path, default=Path("headline-run"), help="results")
    parser.add_argument("--rows", type=int, default=0, help="at most so many for each agent")
    parser.add_argument("--quick", action="store_true", help="a few rows and rounds of each")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
