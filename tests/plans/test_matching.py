"""Whether neurons may change places, asked of graphs that were built from torch's modules."""

from pathlib import Path

import pytest

from coordinator.plans import PlanRequest, build_plan
from coordinator.plans.permutations import check_permutable
from fedloom.errors import Refused
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import Plan
from fedloom.strategies.fedma import chain


def built(name: str, folder: Path) -> Plan:
    """Build the plan of one of the test's networks."""
    request = PlanRequest(model=f"tests.plans.networks:{name}", task="module")
    return build_plan(request, folder, lambda line: None, None)


def test_layers_that_follow_one_another_may_be_permuted(tmp_path: Path) -> None:
    plan = built("layers", tmp_path / "plan")
    assert [layer.spread for layer in chain(plan.layout)] == [1, 1, 4, 1]
    assert check_permutable(plan, tmp_path / "plan")
    (tmp_path / "plan" / INFER_GRAPH).unlink()
    assert not check_permutable(plan, tmp_path / "plan")


def test_what_names_and_shapes_do_not_show_the_graph_does(tmp_path: Path) -> None:
    """A residual connection goes around `second`: permuting `first` alone changes the sum."""
    plan = built("residual", tmp_path / "plan")
    assert len(chain(plan.layout)) == 3
    with pytest.raises(Refused, match=r"second\.weight to follow first\.weight and nothing else"):
        check_permutable(plan, tmp_path / "plan")
