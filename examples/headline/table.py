"""The Markdown table of all cases."""

from collections.abc import Iterator, Sequence

from examples.headline.comparison import CENTRALISED, FEDERATED, LOCAL, Compared
from examples.headline.scores import Measure

_HEAD = (
    "| case | what is dealt to whom | rows | measure | centralised | federated | local-only |"
    " reached | CPU s |",
    "|---|---|---:|---|---:|---:|---:|---|---:|",
)


def table(done: Sequence[Compared]) -> str:
    """Return one line for each case, and one for each further strategy."""
    return "\n".join([*_HEAD, *(line for one in done for line in _lines(one))]) + "\n"


def verdict(one: Compared) -> str:
    """Say plainly whether federated training reached what it shall, and what is missing."""
    case, results = one.case, one.results
    federated, local = results[FEDERATED].score, results[LOCAL].score
    missing = []
    if (federated - local) * case.measure.sign <= 0:
        missing.append("no better than local-only")
    if case.target is not None and (federated - case.target) * case.measure.sign < 0:
        missing.append(f"{case.target:g} not reached")
    if case.close is not None:
        behind = (results[CENTRALISED].score - federated) * case.measure.sign
        if behind > case.close:
            missing.append(f"{behind:.1f} behind centralised, {case.close:g} allowed")
    return "**no**: " + "; ".join(missing) if missing else "yes"


def _lines(one: Compared) -> Iterator[str]:
    case, results = one.case, one.results
    seconds = sum(result.cpu_seconds for result in results.values())
    yield (
        f"| {case.name} | {case.title} | {one.rows:,} | {case.measure} "
        f"| {_figure(one, CENTRALISED)} | {_figure(one, FEDERATED)} | {_figure(one, LOCAL)} "
        f"| {verdict(one)} | {seconds:.0f} |"
    )
    for name in case.others:
        yield f"| | {name} | | | | {_figure(one, name)} | | | |"


def _figure(one: Compared, name: str) -> str:
    score = one.results[name].score
    return f"{score:.2f}" if one.case.measure is Measure.PERPLEXITY else f"{score:.1f}"
