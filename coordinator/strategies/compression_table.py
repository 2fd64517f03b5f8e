"""The table of what travels of a movement, from the kinds and from what run files accept."""

from collections.abc import Iterator
from pathlib import Path

from coordinator.aggregation import Rule
from coordinator.config import parse_run_config
from coordinator.strategies.part_tables import markdown
from fedloom.compression import Compression
from fedloom.errors import ConfigError
from fedloom.terms import LocalTraining, Protection

_COLUMNS = (
    "`compression.kind`",
    "name",
    "paper",
    "an update holds, of U values",
    "bytes under `plain`",
    "bytes under the others",
    "protections",
    "`aggregation.rule`",
    "keys of its own (default)",
)
_TOLD = {  # name, paper, holds, bytes
    Compression.NONE: ("everything", "", "U", "4 U", "those of U values"),
    Compression.RANDOM_MASK: (
        "random mask",
        "arXiv:1610.05492v2, sections 2 and 3",
        "k = share U, at places that all agents draw alike",
        "4 k",
        "those of k values",
    ),
    Compression.TOP_K: (
        "top-k",
        "arXiv:1809.07599v2, Definition 2.1",
        "the k = share U that are largest on each agent, and where they are",
        "8 k",
        "",
    ),
    Compression.QUANTISED: (
        "QSGD, levels of 8 bits",
        "arXiv:1610.02132, section 3.1",
        "U, each as a level of the largest in its 512",
        "U + U / 128",
        "",
    ),
}


def compression_table() -> str:
    """Return the table as Markdown."""
    return markdown(_COLUMNS, map(_row, _TOLD))


def _row(kind: Compression) -> Iterator[str]:
    yield f"`{kind.name.lower()}`"
    yield from _TOLD[kind]
    protections = [one for one in Protection if _parsed(kind, protection=one)]
    yield _named(protections, list(Protection))
    rules = [one for one in (Rule.MEAN, Rule.MEDIAN) if _parsed(kind, rule=one)]
    yield "any" if len(rules) == 2 else "`mean`"
    yield ", ".join(_keys(kind))


def _named(taken: list[Protection], everything: list[Protection]) -> str:
    return "any" if taken == everything else ", ".join(one.name.lower() for one in taken)


def _keys(kind: Compression) -> Iterator[str]:
    terms = _parsed(kind)
    if terms is None or not kind.chooses:
        return
    yield f"`share` ({terms.compression_share:g})"
    yield f"`error_feedback` ({str(terms.error_feedback).lower()})"
    if terms.unbiased:
        yield "`unbiased` (true)"


def _parsed(
    kind: Compression, protection: Protection = Protection.PLAIN, rule: Rule = Rule.MEAN
) -> LocalTraining | None:
    run = {
        "plan": "plan",
        "rounds": 1,
        "protection": {"kind": protection.name.lower()},
        "aggregation": {"rule": rule.name.lower()},
        "compression": {"kind": kind.name.lower()},
    }
    try:
        return parse_run_config(run, Path("/run.toml")).training
    except ConfigError:
        return None
