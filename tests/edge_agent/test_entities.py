"""Entities: merged tags, places that are the text's, and the tasks whose rows are no texts."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.entities import OUTSIDE, merge_tags, split_words
from edge_agent.inference import Entities, Prediction, Values, load_exported
from fedloom.errors import Reason, Refused
from tests.edge_agent.toy_tasks import save_sums, save_tagger

TAGS = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])


def conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return (kind, first, last) of each chunk, by the rules of the CoNLL-2000 script."""
    chunks, start = [], 0
    for i, tag in enumerate([*tags, "O"]):
        before = tags[i - 1] if i else "O"
        begins_here = tag[0] == "B" or (tag[0] == "I" and before[1:] != tag[1:])
        ends_before = before != "O" and (tag == "O" or begins_here)
        if ends_before:
            chunks.append((before[2:], start, i - 1))
        if begins_here:
            start = i
    return chunks


@given(st.lists(TAGS, max_size=12))
def test_tags_are_merged_as_evaluations_of_such_tags_do(tags: list[str]) -> None:
    text = " ".join(f"w{i}" for i in range(len(tags)))
    words = split_words(text)
    tagged = [
        (word, tag, 0.5 + i / 100) for i, (word, tag) in enumerate(zip(words, tags, strict=True))
    ]
    found = list(merge_tags(text, tagged))
    assert [(e.label, e.start, e.end) for e in found] == [
        (kind, words[first].start, words[last].end) for kind, first, last in conlleval(tags)
    ]
    assert all(text[entity.start : entity.end] == entity.text for entity in found)


@given(st.text(max_size=40))
def test_words_stand_where_they_say_and_nothing_but_blanks_is_left_out(text: str) -> None:
    words = split_words(text)
    assert all(text[word.start : word.end] == word.text for word in words)
    places = {i for word in words for i in range(word.start, word.end)}
    assert sum(word.end - word.start for word in words) == len(places)
    assert all(text[i].isspace() for i in set(range(len(text))) - places)


def test_tags_without_prefixes_are_kinds() -> None:
    words = split_words("a b c d")
    tags = zip(words, ["x", "x", OUTSIDE, "y"], [0.9, 0.8, 0.7, 0.6], strict=True)
    assert [(e.label, e.text, e.probability) for e in merge_tags("a b c d", tags)] == [
        ("x", "a b", 0.8),
        ("y", "d", 0.6),
    ]


def tagged(folder: Path, *texts: object) -> list[Entities]:
    adapter = load_exported(folder)
    return adapter.model.answer(adapter.theta, texts)


def test_entities_have_the_places_of_the_text(tmp_path: Path) -> None:
    save_tagger(tmp_path / "plan")
    text = "😀 From New,  York to Paris: noon!"
    [found, nothing, empty] = tagged(tmp_path / "plan", text, "no such words", "")
    assert [(e.label, e.text) for e in found.entities] == [
        ("place", "New"),
        ("place", "York"),
        ("place", "Paris"),
        ("time", "noon"),
    ]
    assert all(text[e.start : e.end] == e.text for e in found.entities)
    assert nothing.entities == empty.entities == ()
    [joined] = tagged(tmp_path / "plan", "in New York at noon")
    assert [e.text for e in joined.entities] == ["New York", "noon"]
    certain = np.exp(4) / (np.exp(4) + 3)
    assert joined.entities[0].probability == pytest.approx(certain)


def test_words_are_taken_as_they_are_given(tmp_path: Path) -> None:
    save_tagger(tmp_path / "plan")
    [found] = tagged(tmp_path / "plan", ["in", "New", "York"])
    assert [(e.text, e.start, e.end) for e in found.entities] == [("New York", 3, 11)]
    for bad in (7, None, ["a", 1], {"text": "a"}):
        with pytest.raises(Refused) as caught:
            tagged(tmp_path / "plan", bad)
        assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("max_tokens", [3, 4, 5, 7, 40])
def test_a_long_text_is_looked_at_in_parts(tmp_path: Path, max_tokens: int) -> None:
    save_tagger(tmp_path / "plan", max_tokens)
    text = "New York, a b c d e New York at noon in Paris " * 3
    [found] = tagged(tmp_path / "plan", text)
    assert [entity.text for entity in found.entities] == [
        "New York",
        "New York",
        "noon",
        "Paris",
    ] * 3


def test_rows_of_arrays_give_values(tmp_path: Path) -> None:
    save_sums(tmp_path / "plan")
    adapter = load_exported(tmp_path / "plan")
    rows = [{"left": [[i, 1, 1], [0, 0, 0]], "right": i} for i in range(70)]
    answers = adapter.model.answer(adapter.theta, rows)
    assert answers == [Values((i + 2.0, 10.0 * i)) for i in range(70)]
    assert adapter.model.answer(adapter.theta, []) == []


def test_rows_of_arrays_give_labels(tmp_path: Path) -> None:
    save_sums(tmp_path / "plan", labels=("sum", "scaled"))
    adapter = load_exported(tmp_path / "plan")
    [found] = adapter.model.answer(adapter.theta, [{"left": [[0, 0, 0]] * 2, "right": 0.1}])
    assert isinstance(found, Prediction)
    assert found.label == "scaled"
    assert found.most_probable(1) == {"scaled": found.probability}
    assert list(found.most_probable(2)) == ["scaled", "sum"]
    assert sum(found.probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    "row",
    [
        7,
        {},
        {"left": [[0, 0, 0]] * 2},
        {"left": [[0, 0, 0]] * 2, "right": 1, "more": 1},
        {"left": [[0, 0]] * 2, "right": 1},
        {"left": [[0, 0, 0], [0]], "right": 1},
        {"left": [[0, 0, 0]] * 2, "right": float("nan")},
        {"left": [[0, 0, 0]] * 2, "right": 1e300},
        {"left": [[0, 0, 0]] * 2, "right": "one"},
        {"left": [[0, 0, 0]] * 2, "right": None},
        {"left": [[0, 0, 0]] * 2, "right": 10**400},
    ],
)
def test_rows_of_another_form_are_refused(tmp_path: Path, row: object) -> None:
    save_sums(tmp_path / "plan")
    adapter = load_exported(tmp_path / "plan")
    with pytest.raises(Refused) as caught:
        adapter.model.answer(adapter.theta, [row])
    assert caught.value.reason is Reason.MALFORMED
