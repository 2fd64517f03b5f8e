"""A card says what was agreed and measured, whatever the names in it are made of."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.model_cards import CARD_MARK, RoundFacts, RunFacts, describe
from fedloom.plans import Plan, PlanMember, PlanOrigin, TrainableTensor
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.tasks import TextClassification
from fedloom.terms import Encoding, LocalTraining, Protection, Release

PLAN = Plan(
    "intent",
    (PlanMember("infer.onnx", 10, b"\1" * 32),),
    (TrainableTensor("head", (2, 3), 0),),
    TextClassification(("on", "off"), 16, 0),
    PlanOrigin("MiniLM", 4, 8.0, ("query", "value"), True),
)
RUN = RunFacts(
    run="ab" * 16,
    name="kitchen",
    rounds=2,
    of=3,
    privacy=PrivacyTerms(Protection.SEALED, Release.COORDINATOR, 3, True),
    training=LocalTraining(epochs=7, learning_rate=0.0125),
    encoding=Encoding(Protection.SEALED, update_bits=8),
    history=(RoundFacts(1, 5, 0.75, 0.5, 40), RoundFacts(2, 4, began_with={"accuracy": 0.25})),
)


def rows(card: str) -> dict[str, str]:
    """Return the tables' rows by their first cell."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {first: " | ".join(rest) for first, *rest in cells}


def test_it_says_what_was_agreed_and_measured() -> None:
    card = describe(PLAN, RUN, "fedloom 1")
    found = rows(card)
    assert found["base model"] == "MiniLM"
    assert found["labels (2)"] == "on, off"
    assert found["LoRA"] == "rank 4, alpha 8, A frozen"
    assert found["rounds"] == "2 of 3"
    assert found["1"] == "5 | 0.7500 | 0.5000 | not known | 40 | not known"
    assert found["2"] == "4 | not known | not known | not known | none | accuracy 0.2500"
    assert found["protection"] == "sealed"
    assert found["bits of a value in an update"] == "8"
    for entry in fields(LocalTraining):
        assert entry.name.replace("_", " ") in found
    assert (found["epochs"], found["learning rate"]) == ("7", "0.0125")
    for party, learns in privacy_statement(RUN.privacy).lines():
        assert f"| {party} | {learns} |" in card
    assert "01" * 32 in card


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("release", Release)
def test_it_prints_the_statement_of_every_protection(
    protection: Protection, release: Release
) -> None:
    privacy = PrivacyTerms(protection, release, 3)
    card = describe(PLAN, replace(RUN, privacy=privacy), "fedloom 1")
    assert all(f"| {learns} |" in card for _, learns in privacy_statement(privacy).lines())


@given(text=st.text(min_size=1, max_size=40))
def test_names_and_labels_change_no_line_of_it(text: str) -> None:
    """Nobody's label becomes a heading, a cell, a tag, or a fence of code."""
    plain = describe(PLAN, RUN, "fedloom 1").splitlines()
    labels = (f"a{text}", f"b{text}")
    plan = replace(
        PLAN,
        name=text,
        task=TextClassification(labels, 16, 0),
        origin=replace(PLAN.origin, base_model=text, lora_targets=(text,)),
    )
    card = describe(plan, replace(RUN, name=text), "fedloom 1")
    lines = card.split("\n")[:-1]
    assert len(lines) == len(plain)
    assert json.loads(lines[1].removeprefix("base_model: ")) == text
    for line, before in zip(lines[2:], plain[2:], strict=True):
        assert line.replace("\\|", "").count("|") == before.count("|")
        assert "`" not in line.replace("\\`", "")
        assert "<" not in line or line == CARD_MARK
        assert line[:1] == before[:1]
