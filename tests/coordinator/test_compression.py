"""`[compression]` of a run file: defaults, and what is refused with the nearest that works."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.config import parse_run_config
from fedloom.compression import Compression
from fedloom.errors import ConfigError
from fedloom.terms import LocalTraining

PATH = Path("/run.toml")


def training(compression: dict[str, Any], kind: str = "sealed", **more: Any) -> LocalTraining:
    """Return the terms of a run with this table."""
    run = {"plan": "p", "rounds": 1, "protection": {"kind": kind}, "compression": compression}
    return parse_run_config(run | more, PATH).training


def test_nothing_is_left_out_unless_it_is_said() -> None:
    terms = parse_run_config({"plan": "p", "rounds": 1}, PATH).training
    assert (terms.compression, terms.compression_share) == (Compression.NONE, 0.0)
    assert (terms.error_feedback, terms.unbiased) == (False, False)


def test_defaults_of_each_kind() -> None:
    found = {
        kind: training({"kind": kind}, "plain") for kind in ("random_mask", "top_k", "quantised")
    }
    assert {
        kind: (terms.compression_share, terms.error_feedback, terms.unbiased)
        for kind, terms in found.items()
    } == {
        "random_mask": (0.1, False, True),
        "top_k": (0.1, True, False),
        "quantised": (0.0, False, False),
    }
    waiting = training({"kind": "random_mask", "error_feedback": True})
    assert (waiting.error_feedback, waiting.unbiased) == (True, False)


@pytest.mark.parametrize("protection", ["masked", "encrypted", "sealed"])
@pytest.mark.parametrize("kind", ["top_k", "quantised"])
def test_updates_that_only_a_reader_can_add_need_plain(kind: str, protection: str) -> None:
    nearest = "random_mask" if kind == "top_k" else "update_bits = 8"
    with pytest.raises(ConfigError, match=nearest):
        training({"kind": kind}, protection)


@pytest.mark.parametrize(("kind", "goes"), [("top_k", 0), ("quantised", 0), ("random_mask", 1)])
def test_robust_rules_read_updates_that_have_all_their_values(kind: str, goes: bool) -> None:
    robust = {"aggregation": {"rule": "median"}}
    if goes:
        training({"kind": kind}, "plain", **robust)
    else:
        with pytest.raises(ConfigError, match=r'use compression\.kind = "random_mask"'):
            training({"kind": kind}, "plain", **robust)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"kind": "gzip"}, "compression.kind: expected one of"),
        ({"kind": "random_mask", "share": 1.0}, "below 1"),
        ({"kind": "top_k", "share": 0.6}, "QUANTISED"),
        ({"kind": "none", "share": 0.1}, "compression_share 0"),
        ({"kind": "quantised", "error_feedback": True}, "error_feedback false"),
        ({"kind": "random_mask", "error_feedback": True, "unbiased": True}, "unbiased false"),
        ({"shares": 0.1}, "unknown key"),
    ],
)
def test_other_tables_are_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        training(table, "plain")


def test_strategies_that_count_on_whole_updates_are_refused() -> None:
    terms = {"strategy": "scaffold", "optimizer": "sgd", "weighting": "uniform", "local_steps": 1}
    table = {"plan": "p", "rounds": 1, "cohort": {"population": 100}, "training": terms}
    table |= {"protection": {"clip": 1.0}, "compression": {"kind": "random_mask"}}
    with pytest.raises(ConfigError, match="FED_AVG or FED_PROX"):
        parse_run_config(table, PATH)
