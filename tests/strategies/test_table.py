"""The table that operators read is the code's."""

from coordinator.aggregation import Rule
from coordinator.strategies.__main__ import README
from coordinator.strategies.compression_table import compression_table
from coordinator.strategies.part_tables import factor_table, personal_table, robust_table
from coordinator.strategies.table import table, with_tables
from fedloom.compression import Compression
from fedloom.strategies import RULES
from fedloom.terms import LoraRule, Personal, Strategy


def test_the_committed_tables_are_current() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "run: python -m coordinator.strategies"


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
    assert "| P + C |" in rows["FedMA"]
    assert rows["FedMA"].endswith("| plain, either release |")


def test_every_rule_for_parts_and_every_robust_rule_has_a_row() -> None:
    for rule, made in (
        (LoraRule, factor_table),
        (Personal, personal_table),
        (Rule, robust_table),
        (Compression, compression_table),
    ):
        for member in rule:
            assert f"| `{member.name.lower()}` |" in made()


def test_the_tables_say_what_travels_and_what_is_read() -> None:
    factors = {row.split(" | ")[1]: row for row in factor_table().splitlines()}
    assert "| B | A |  | A then B | exact |" in factors["RoLoRA"]
    assert "| A | A | B |" in factors["FedSA-LoRA"]
    assert "`ditto`" not in factors["FedSA-LoRA"]
    robust = {row.split(" | ")[1]: row for row in robust_table().splitlines()}
    assert robust["Krum"].endswith("| plain |")
    assert robust["weighted mean"].endswith("| any |")
    travelling = {row.split(" | ")[1]: row for row in compression_table().splitlines()}
    assert "| any | any |" in travelling["random mask"]
    assert "| plain | `mean` |" in travelling["top-k"]
