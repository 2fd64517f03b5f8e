"""Train federated, centralised and alone on public data, and write what each reaches.

    python -m examples.headline [--cases banking77 mnist] [--data-root PATH] [--choose] [--quick]

Cases and grids whose data are not there are skipped. Results are kept in the output folder by case
and training; what is there for the same settings is not trained again.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import structlog

from examples.headline.cases import CASES, Case
from examples.headline.comparison import Compared, compare, quickened
from examples.headline.grids import GRIDS, Grid, Gridded, grid_table
from examples.headline.table import table

_BESIDE = Path(__file__).parents[3] / "shared"  # data beside the project, where there are any


def main() -> int:
    """Run the cases that were asked for; return the process's status."""
    options = _options()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(40),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    models = options.models_root or options.data_root.parent / "models"
    done: list[Compared] = []
    gridded: list[Gridded] = []
    for one in (*CASES, *GRIDS):
        if options.cases and one.name not in options.cases:
            continue
        if missing := _missing(one, options.data_root, models):
            print(f"{one.name}: skipped, for there is no {missing}", file=sys.stderr)
            continue
        cases = [one] if isinstance(one, Case) else [one.case(seed) for seed in range(one.seeds)]
        found = [
            compare(_asked(case, options), options.data_root, models, options.out, _report)
            for case in cases
        ]
        if isinstance(one, Case):
            done += found
        else:
            gridded.append(Gridded(one, found))
    if not done and not gridded:
        print("no case was run: name the folder of the data by --data-root", file=sys.stderr)
        return 0
    _write(done, gridded, options.out)
    return 0


def _asked(case: Case, options: argparse.Namespace) -> Case:
    if options.rows:
        case = replace(case, most_rows=options.rows, test_rows=options.rows)
    if options.choose:
        case = replace(case, name=f"{case.name}-choosing", choosing=True)
    return quickened(case) if options.quick else case


def _write(done: list[Compared], gridded: list[Gridded], out: Path) -> None:
    parts = ([table(done)] if done else []) + [grid_table(grid) for grid in gridded]
    text = "\n".join(parts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    print(text)
    _draw(done, gridded, out)


def _missing(one: Case | Grid, data: Path, models: Path) -> Path | None:
    model = one.model if isinstance(one, Case) else ""
    needed = [data / one.data] + ([models / model] if model else [])
    return next((path for path in needed if not path.exists()), None)


def _draw(done: list[Compared], gridded: list[Gridded], out: Path) -> None:
    try:
        from examples.headline.plots import draw, draw_grids
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('no plots: matplotlib comes with pip install "fedloom[headline]"', file=sys.stderr)
        return
    if done:
        draw(done, out / "headline.png")
    if gridded:
        draw_grids(gridded, out / "grids.png")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.headline",
        description="Compare federated with centralised and local-only training.",
    )
    names = [one.name for one in (*CASES, *GRIDS)]
    parser.add_argument("--cases", nargs="*", choices=names, help="which cases; all unless named")
    parser.add_argument("--data-root", type=Path, default=_BESIDE / "data", help="the data sets")
    parser.add_argument("--models-root", type=Path, help="default: models beside the data root")
    parser.add_argument("--out", type=Path, default=Path("headline-run"), help="results")
    parser.add_argument("--rows", type=int, default=0, help="at most so many for each agent")
    parser.add_argument(
        "--choose", action="store_true", help="measure on training rows held back, not on the test"
    )
    parser.add_argument("--quick", action="store_true", help="a few rows and rounds of each")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
