"""The table that operators read is the code's."""

from coordinator.strategies.__main__ import README
from coordinator.strategies.table import table, with_table
from fedloom.strategies import RULES
from fedloom.terms import Strategy


def test_the_committed_table_is_current() -> None:
    text = README.read_text()
    assert with_table(text) == text, "run: python -m coordinator.strategies"


def test_every_strategy_has_a_rule_and_a_row() -> None:
    assert set(RULES) == set(Strategy)
    for strategy in Strategy:
        assert f"| `{strategy.name.lower()}` |" in table()


def test_the_table_says_what_terms_refuse() -> None:
    rows = {row.split(" | ")[1]: row for row in table().splitlines()}
    assert "| 2P |" in rows["SCAFFOLD"]
    assert "| P + 1 |" in rows["FedNova"]
    assert "| `sgd` | `uniform` |" in rows["SCAFFOLD"]
    assert "| any | `uniform` |" in rows["FedDyn"]
    assert "| any | any |" in rows["FedAvg"]
