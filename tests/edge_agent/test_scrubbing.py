"""Scrubbing: what has the form of personal data is replaced, and nothing else is touched."""

import string
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_agent.scrubbing import Kind, Scrub, Scrubber
from fedloom.adapters import write_adapter
from fedloom.errors import ConfigError
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import (
    ADAPTER_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    PlanOrigin,
    TrainableTensor,
)
from fedloom.tasks import TokenClassification

FORMED = (Kind.EMAIL, Kind.IBAN, Kind.CARD, Kind.PHONE)
PERSONAL = {
    "anna.b+c@mail.example.org": "<EMAIL>",
    "DE89 3704 0044 0532 0130 00": "<IBAN>",
    "GB82WEST12345698765432": "<IBAN>",
    "4111 1111 1111 1111": "<CARD>",
    "5500-0000-0000-0004": "<CARD>",
    "378282246310005": "<CARD>",
    "+49 30 1234567": "<PHONE>",
    "+1 (425) 882-8080": "<PHONE>",
}
HARMLESS = (
    "GB82WEST12345698765433",  # check digits are wrong
    "4111 1111 1111 1112",
    "order 12345678 of 2026-11-20",
    "user@localhost",
    "3.14159265358979",
    "030 1234567",  # no country's code
)
words_alone = st.text(string.ascii_lowercase, min_size=1, max_size=8)
personal = st.sampled_from(sorted(PERSONAL))
pieces = st.lists(words_alone | personal, max_size=8)


def scrubber(counts: Counter[str], scrub: Scrub = Scrub(FORMED)) -> Scrubber:  # noqa: B008
    return Scrubber(scrub, counts)


@given(pieces)
def test_personal_data_among_words_are_replaced_and_counted(parts: list[str]) -> None:
    parts = [part for pair in zip(parts, ["and"] * len(parts), strict=True) for part in pair]
    counts: Counter[str] = Counter()
    expected = " ".join(PERSONAL.get(part, part) for part in parts)
    assert scrubber(counts).text(" ".join(parts)) == expected
    tokens = Counter(PERSONAL[part] for part in parts if part in PERSONAL)
    assert {f"<{kind.upper()}>": count for kind, count in counts.items()} == tokens


@given(pieces, st.sampled_from(["", ":", '"']), st.sampled_from(["", ").", ",", "!"]))
def test_as_many_words_come_out_as_went_in(parts: list[str], before: str, after: str) -> None:
    """Their tags stay where they are; a word without personal data is the same."""
    words: list[str] = []
    expected: list[str] = []
    for part in parts:
        several = [*f"{before}{part}{after}".split(), "and"]
        words += several
        if part not in PERSONAL:
            expected += several
        elif len(several) == 2:
            expected += [f"{before}{PERSONAL[part]}{after}", "and"]
        else:
            expected += [PERSONAL[part]] * (len(several) - 1) + ["and"]
            expected[-len(several)] = before + PERSONAL[part]
            expected[-2] = PERSONAL[part] + after
    if "+1 (425) 882-8080" not in parts:  # whose own bracket is a word's edge
        assert scrubber(Counter()).words(words) == expected
    assert len(scrubber(Counter()).words(words)) == len(words)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_stays(text: str) -> None:
    counts: Counter[str] = Counter()
    assert scrubber(counts).text(text) == text
    assert not counts


def test_numbers_are_found_between_other_groups() -> None:
    text = "12 4111 1111 1111 1111 12/27 XY12 DE89 3704 0044 0532 0130 00 thank you"
    assert scrubber(Counter()).text(text) == "12 <CARD> 12/27 XY12 <IBAN> thank you"


@given(st.text(max_size=60))
def test_any_text_is_taken_and_scrubbing_again_changes_nothing(text: str) -> None:
    once = scrubber(Counter()).text(text)
    assert scrubber(Counter()).text(once) == once


def test_a_region_finds_its_own_numbers() -> None:
    german = Scrub((Kind.PHONE,), "DE")
    assert scrubber(Counter(), german).text("Tel. 030 1234567") == "Tel. <PHONE>"
    with pytest.raises(ConfigError, match="phone_region"):
        scrubber(Counter(), Scrub((Kind.PHONE,), "XX"))


def test_only_the_kinds_that_were_asked_for_are_replaced() -> None:
    text = "a@b.org +49 30 1234567"
    assert scrubber(Counter(), Scrub((Kind.EMAIL,))).text(text) == "<EMAIL> +49 30 1234567"


@pytest.mark.parametrize(
    ("kind", "library"),
    [(Kind.IBAN, "stdnum"), (Kind.CARD, "stdnum"), (Kind.PHONE, "phonenumbers")],
)
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r'pip install "fedloom\[scrub\]"'):
        scrubber(Counter(), Scrub((kind,)))


NAMES = {"anna", "li", "o'hara"}


def save_tagger(folder: Path, labels: tuple[str, ...] = ("O", "B-PER", "I-PER")) -> Path:
    """Write a model by hand that takes a few words for names, and four tokens at a time."""
    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(["?", *sorted(NAMES), "met", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / TOKENIZER_FILE))
    scores = [[0.0, float(word in NAMES), 0.0] for word in vocabulary]
    table = ", ".join(str(score) for row in scores for score in row)
    graph = f"""<ir_version: 8, opset_import: ["": 18]>
    infer (float[1] theta, int64[B,S] input_ids, int64[B,S] attention_mask)
      => (float[B,S,3] logits) <float[{len(scores)},3] table = {{{table}}}>
      {{ logits = Gather(table, input_ids) }}"""
    (folder / INFER_GRAPH).write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    layout = (TrainableTensor("w", (1,), 0),)
    write_adapter(folder / ADAPTER_FILE, layout, np.zeros(1, np.float32))
    task = TokenClassification(labels, 4, 0)
    plan = Plan("names", (), layout, task, PlanOrigin("test"))
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return folder


@given(words=st.lists(st.sampled_from(["met", "x", *sorted(NAMES)]), max_size=12))
def test_names_are_those_that_a_model_tags_however_long_the_text(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    """Words of one name that follow each other are one; the tags of words stay where they are."""
    folder = tmp_path_factory.getbasetemp() / "tagger"
    names = Scrub((Kind.NAMES,), names_model=folder if folder.exists() else save_tagger(folder))
    pieces: list[str] = []
    for word in words:
        piece = "<NAME>" if word in NAMES else word
        if piece != "<NAME>" or pieces[-1:] != ["<NAME>"]:
            pieces.append(piece)
    assert scrubber(Counter(), names).text(" ".join(words)) == " ".join(pieces)
    expected = ["<NAME>" if word in NAMES else word for word in words]
    assert scrubber(Counter(), names).words(words) == expected


def test_names_without_a_model_that_tags_them_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names_model"):
        scrubber(Counter(), Scrub((Kind.NAMES,)))
    with pytest.raises(ConfigError, match=r"names_model.*exported model"):
        scrubber(Counter(), Scrub((Kind.NAMES,), names_model=tmp_path))
    places = save_tagger(tmp_path / "places", ("O", "B-place", "I-place"))
    with pytest.raises(ConfigError, match="such as B-PER"):
        scrubber(Counter(), Scrub((Kind.NAMES,), names_model=places))
