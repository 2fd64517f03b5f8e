"""Examples of every task: what graphs are given is what rows say, and nothing of it twice."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edge_agent.batches import Examples
from edge_agent.data import DataSource, Treatment, UnknownLabels
from edge_agent.examples import read_examples
from edge_agent.kept_examples import KEPT_FILE
from fedloom.errors import Reason, Refused
from fedloom.plans import TOKENIZER_FILE, Plan, PlanOrigin, TrainableTensor
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayInput,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)
from tests.small_disk import mounted

TAGS = ("O", "B-place", "I-place")
PIECES = ("lo", "##nd", "##on", "to", "##ky", "##o", "is", "a", "##b", "in", "x", ".", "i")
VOCABULARY = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *PIECES))}
BOS = 256


def plan_for(task: Task) -> Plan:
    return Plan("test", (), (TrainableTensor("w", (1,), 0),), task, PlanOrigin("test"))


def tagging(max_tokens: int = 64) -> TokenClassification:
    return TokenClassification(TAGS, max_tokens, 0)


def modelling(prompt: str = "", answer: str = "{text}", max_tokens: int = 64):
    return CausalLanguageModelling(max_tokens, 0, 300, 1, 1, 1, prompt, answer, (257, 258))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that cuts words into pieces, as BERT's does."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes that puts a token before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<s>": BOS, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    folder = tmp_path_factory.mktemp("characters")
    tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path)


def of_row(examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """Return one row's token ids and labels as a graph is given them."""
    alone = np.array([row])
    inputs = examples.inputs(alone)
    assert inputs["attention_mask"].all()
    return inputs["input_ids"][0].tolist(), examples.labels(alone)[0].tolist()


# token classification

words_of_pieces = st.lists(
    st.sampled_from(("london", "tokyo", "is", "a.b", "lo-lo", "x", "zz", "", "\u200b", "ab ab")),
    min_size=1,
    max_size=12,
)


@given(st.lists(words_of_pieces, min_size=1, max_size=6), st.integers(3, 20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_words_first_token_has_its_tag_as_transformers_aligns_them(
    pieces: Path, tmp_path: Path, texts: list[list[str]], max_tokens: int
) -> None:
    """Oracle: `word_ids` of transformers' tokenizer, with the rule of its own examples."""
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(pieces / TOKENIZER_FILE))
    rows = [{"words": words, "tags": [TAGS[len(w) % 3] for w in words]} for words in texts]
    expected = []
    for words in texts:
        encoding = oracle(words, is_split_into_words=True, truncation=True, max_length=max_tokens)
        word_ids = encoding.word_ids()
        labels = [
            IGNORED_LABEL if word is None or word == before else len(words[word]) % 3
            for before, word in zip([None, *word_ids], word_ids, strict=False)
        ]
        if set(labels) != {IGNORED_LABEL}:
            expected.append((encoding["input_ids"], labels))
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    if not expected:
        with pytest.raises(Refused, match="nothing to learn"):
            read_examples(pieces, plan_for(tagging(max_tokens)), source)
        return
    examples, broken = read_examples(pieces, plan_for(tagging(max_tokens)), source)
    assert [of_row(examples, i) for i in range(len(examples))] == expected
    assert broken == len(texts) - len(expected)


def test_padding_is_not_learned(pieces: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"words": ["london", "x"], "tags": ["B-place", "O"]},
        {"words": ["x"], "tags": ["O"]},
    ]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    examples, _ = read_examples(pieces, plan_for(tagging()), source)
    both = np.array([0, 1])
    assert examples.labels(both).tolist() == [
        [-100, 1, -100, -100, 0, -100],
        [-100, 0, -100, -100, -100, -100],
    ]
    assert examples.inputs(both)["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def test_every_format_of_words_gives_the_same_examples(pieces: Path, tmp_path: Path) -> None:
    texts = [(["london", "is", "x"], ["B-place", "O", "O"]), (["tokyo"], ["B-place"])]
    conll = "-DOCSTART- O\n\n# id 7 domain=en\n" + "\n\n".join(
        "\n".join(f"{word} _ _ {tag}" for word, tag in zip(*text, strict=True)) for text in texts
    )
    (tmp_path / "a.conll").write_text(conll)
    (tmp_path / "b.txt").write_text(conll.replace(" _ _ ", "\t") + "\n\n\n")
    table = pa.table({"words": [t[0] for t in texts], "tags": [t[1] for t in texts]})
    pq.write_table(table, tmp_path / "c.parquet")
    write_jsonl(tmp_path / "d.jsonl", [{"words": w, "tags": t} for w, t in texts])
    (tmp_path / "e.csv").write_text(
        "words,tags\nlondon is x,B-place O O\n" + '"[""tokyo""]","[""B-place""]"\n'
    )
    digests = {
        read_examples(pieces, plan_for(tagging()), DataSource(path))[0].sha256
        for path in sorted(tmp_path.iterdir())
    }
    assert len(digests) == 1


def test_words_and_tags_that_do_not_fit_are_a_broken_row(pieces: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"words": ["x", "is"], "tags": ["O"]},
        {"words": ["x"], "tags": ["O"]},
        {"words": ["x"], "tags": [None]},
        {"words": [], "tags": []},
        {"words": {"x": 1}, "tags": ["O"]},
    ]
    examples, broken = read_examples(
        pieces, plan_for(tagging()), write_jsonl(tmp_path / "d.jsonl", rows)
    )
    assert (len(examples), broken) == (1, 4)


# causal language modelling


@given(
    st.lists(
        st.tuples(st.text("ab {}?", max_size=9), st.text("cdé\n", max_size=9)),
        min_size=1,
        max_size=5,
    ),
    st.integers(2, 40),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_the_answer_and_its_end_are_learned(
    characters: Path, tmp_path: Path, rows: list[tuple[str, str]], max_tokens: int
) -> None:
    """Oracle: every token of this tokenizer is a byte, so the labels can be counted off."""
    tokenizer = Tokenizer.from_file(str(characters / TOKENIZER_FILE))
    expected = []
    for question, reply in rows:
        given_bytes, learned = f"Q: {question}\nA:".encode(), f" {reply}".encode()
        tokens = [BOS, *_ids(tokenizer, given_bytes.decode()), *_ids(tokenizer, learned.decode())]
        tokens.append(257)
        labels = [IGNORED_LABEL] * (1 + len(given_bytes)) + tokens[1 + len(given_bytes) :]
        tokens, labels = tokens[:max_tokens], labels[:max_tokens]
        if reply.strip() and labels != [IGNORED_LABEL] * max_tokens:
            expected.append((tokens, labels))
    task = modelling("Q: {q}\nA:", " {r}", max_tokens)
    source = write_jsonl(tmp_path / "d.jsonl", [{"q": q, "r": r} for q, r in rows])
    if not expected:
        with pytest.raises(Refused) as refused:
            read_examples(characters, plan_for(task), source)
        assert refused.value.reason is Reason.DATA_EMPTY
        return
    examples, broken = read_examples(characters, plan_for(task), source)
    assert [of_row(examples, i) for i in range(len(examples))] == expected
    assert broken == len(rows) - len(expected)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode())
    return ids


def test_a_devices_own_templates_take_the_place_of_the_plans(
    characters: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [{"frage": "a", "antwort": "b"}])
    plan = plan_for(modelling("{question}", "{reply}"))
    with pytest.raises(Refused, match="expected a column 'question'"):
        read_examples(characters, plan, source)
    own = replace(source, prompt="{frage}:", answer="{antwort}")
    same = write_jsonl(tmp_path / "e.jsonl", [{"question": "a:", "reply": "b"}])
    assert (
        read_examples(characters, plan, own)[0].sha256
        == read_examples(characters, plan, same)[0].sha256
    )


def test_no_tokens_that_end_a_text_stand_between_prompt_and_answer(
    pieces: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [{"q": "london", "r": "x"}])
    examples, _ = read_examples(pieces, plan_for(modelling("{q}", "{r}")), source)
    assert of_row(examples, 0) == ([2, 4, 5, 6, 14, 257], [-100] * 4 + [14, 257])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" no", ["▁q:", "▁no"]), ("no", ["▁q:", "▁no"])],
    ids=["in one with the prompt", "apart: the two share a token"],
)
def test_an_answer_is_cut_as_it_follows_its_prompt(
    tmp_path: Path, answer: str, expected: list[str]
) -> None:
    """A tokenizer that begins every text with a blank must not put one into the middle."""
    vocabulary = {word: i for i, word in enumerate(("?", "▁q:", "▁no", "▁", "▁q:no", "▁▁no"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    source = write_jsonl(tmp_path / "d.jsonl", [{"q": "q:", "r": answer}])
    task = replace(modelling("{q}", "{r}"), stop_token_ids=())
    examples, _ = read_examples(tmp_path, plan_for(task), source)
    prompt, learned = (vocabulary[word] for word in expected)
    assert of_row(examples, 0) == ([prompt, learned], [IGNORED_LABEL, learned])


# array learning

SENSORS = ArrayLearning((ArrayInput("window", (2, 3)), ArrayInput("age", ())), ("off", "on"))
MAPPING = (("window", ("x0..x5",)), ("age", ("years",)))


def _sensor_files(folder: Path, windows: np.ndarray, ages: np.ndarray, labels: list[str]) -> None:
    header = [*(f"x{i}" for i in range(6)), "years", "label"]
    rows = [
        [*window.reshape(-1).tolist(), age, label]
        for window, age, label in zip(windows, ages.tolist(), labels, strict=True)
    ]
    lines = [",".join(map(str, row)) for row in [header, *rows]]
    (folder / "a.csv").write_text("\n".join(lines))
    write_jsonl(folder / "b.jsonl", [dict(zip(header, row, strict=True)) for row in rows])
    table = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    pq.write_table(pa.table(table), folder / "c.parquet")
    write_jsonl(
        folder / "d.jsonl",
        [
            {"window": window.tolist(), "age": age, "label": label}
            for window, age, label in zip(windows, ages.tolist(), labels, strict=True)
        ],
    )
    np.savez(folder / "e.npz", window=windows, age=ages, label=np.array(labels))
    np.savez_compressed(folder / "f.npz", window=windows, age=ages, label=np.array(labels))


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_format_of_numbers_gives_the_same_examples(
    tmp_path: Path, count: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    windows = generator.standard_normal((count, 2, 3)).astype(np.float32)
    ages = generator.standard_normal(count).astype(np.float32)
    classes = generator.integers(0, 2, count)
    _sensor_files(tmp_path, windows, ages, [SENSORS.labels[i] for i in classes])
    for path in sorted(tmp_path.iterdir()):
        mapping = MAPPING if path.name[0] in "abc" else ()
        examples, broken = read_examples(
            tmp_path, plan_for(SENSORS), DataSource(path, arrays=mapping)
        )
        rows = generator.permutation(count)
        found = examples.inputs(rows)
        np.testing.assert_array_equal(found["window"], windows[rows])
        np.testing.assert_array_equal(found["age"], ages[rows])
        np.testing.assert_array_equal(examples.labels(rows), classes[rows])
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
        assert examples.labels(rows).dtype == np.int64
        assert broken == 0


def test_values_are_learned_from_as_many_columns(tmp_path: Path) -> None:
    task = ArrayLearning((ArrayInput("x", (2,)),), values=2)
    path = tmp_path / "d.csv"
    path.write_text("x,y,u,v\n1,2,3,4\n5,6,7,8.5\n")
    source = DataSource(path, arrays=(("x", ("x", "y")), ("labels", ("u..v",))))
    examples, _ = read_examples(tmp_path, plan_for(task), source)
    assert examples.labels(np.array([1, 0])).tolist() == [[7, 8.5], [3, 4]]
    assert examples.labels(np.array([0])).dtype == np.float32


def test_rows_that_are_no_finite_numbers_are_broken(tmp_path: Path) -> None:
    task = ArrayLearning((ArrayInput("x", (2,)),), ("off", "on"))
    values = [[1, 2], [1], [1, None], ["a", 1], [1e39, 1], [float("nan"), 1], [[1], [2]], None]
    rows = [{"x": value, "label": "on"} for value in values]
    examples, broken = read_examples(
        tmp_path, plan_for(task), write_jsonl(tmp_path / "d.jsonl", rows)
    )
    assert (len(examples), broken) == (2, 6)


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"x": np.zeros((3, 2)), "label": np.zeros(2)}, "as many rows"),
        ({"x": np.zeros((3, 2), order="F"), "label": np.zeros(3)}, "C order"),
        ({"x": np.array([None, None]), "label": np.zeros(2)}, "numbers or texts"),
        ({"x": np.zeros(()), "label": np.zeros(2)}, "C order"),
        ({"label": np.zeros(2)}, "expected a column 'x'"),
    ],
)
def test_an_archive_that_is_not_rows_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], what: str
) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    task = ArrayLearning((ArrayInput("x", (2,)),), ("0", "1"))
    with pytest.raises(Refused, match=what):
        read_examples(tmp_path, plan_for(task), DataSource(path))


# what every task has in common


def test_rows_of_unknown_labels_are_refused_or_skipped(pieces: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"words": ["x"], "tags": ["O"]},
        {"words": ["x", "is"], "tags": ["O", "B-person"]},
    ]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(Refused, match=r"'B-person' in row 2 of d\.jsonl") as refused:
        read_examples(pieces, plan_for(tagging()), source)
    assert refused.value.reason is Reason.DATA_LABEL_UNKNOWN
    skipping = replace(source, treatment=Treatment(UnknownLabels.SKIP))
    examples, broken = read_examples(pieces, plan_for(tagging()), skipping)
    assert (len(examples), broken) == (1, 0)


@pytest.fixture
def kept(pieces: Path, tmp_path: Path) -> Callable[..., bytes]:
    """Read classified texts with a folder to keep them in; return the examples' digest."""

    def read(path: Path, max_tokens: int = 9) -> bytes:
        task = TextClassification(("yes", "no"), max_tokens, 0)
        source = DataSource(path, treatment=Treatment(kept_in=tmp_path / "home" / "train"))
        return read_examples(pieces, plan_for(task), source)[0].sha256

    return read


def test_data_are_read_again_only_when_they_or_the_plan_have_changed(
    kept: Callable[..., bytes], tmp_path: Path
) -> None:
    folder, data = tmp_path / "home" / "train", tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("text,label\nlondon,yes\nx is a,no\n")

    def made() -> int:
        return (folder / KEPT_FILE).stat().st_ino

    first, inode = kept(data), made()
    assert (kept(data), made()) == (first, inode)
    assert kept(data, 3) != first
    assert made() != inode
    assert kept(data) == first
    (data / "b.csv").write_text("text,label\ntokyo,no\n")
    more = kept(data)
    assert more != first
    (data / "b.csv").write_text("text,label\ntokio,no\n")  # of the same size
    assert kept(data) != more
    assert [path.name for path in folder.parent.iterdir()] == ["train"]


def test_what_is_kept_is_for_its_owner_alone_and_goes_with_the_data(
    kept: Callable[..., bytes], tmp_path: Path
) -> None:
    folder, data = tmp_path / "home" / "train", tmp_path / "a.csv"
    data.write_text("text,label\nlondon,yes\n")
    kept(data)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    data.unlink()
    with pytest.raises(Refused):
        kept(data)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "garbage"])
def test_damaged_files_are_made_again(
    kept: Callable[..., bytes], tmp_path: Path, damage: str
) -> None:
    data = tmp_path / "a.csv"
    data.write_text("text,label\nlondon,yes\nx is a,no\n")
    expected = kept(data)
    tokens, about = (tmp_path / "home" / "train" / name for name in ("tokens", KEPT_FILE))
    content = tokens.read_bytes()
    match damage:
        case "flip":
            tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "cut":
            tokens.write_bytes(content[:-1])
        case "delete":
            tokens.unlink()
        case _:
            about.write_text("[]")
    assert kept(data) == expected
    assert tokens.read_bytes() == content


def test_a_full_disk_refuses_the_data_and_leaves_nothing(pieces: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": "x " * 200, "label": "yes"}] * 3000)
    task = TextClassification(("yes", "no"), 100, 0)
    with mounted(tmp_path / "home", 400) as disk:
        kept_in = disk.folder / "examples" / "train"
        full = replace(source, treatment=Treatment(kept_in=kept_in))
        with pytest.raises(Refused, match="room for") as refused:
            read_examples(pieces, plan_for(task), full)
        assert refused.value.reason is Reason.DATA_UNREADABLE
        assert list(kept_in.parent.iterdir()) == []
        few = write_jsonl(tmp_path / "e.jsonl", [{"text": "x", "label": "yes"}] * 30)
        read_examples(pieces, plan_for(task), replace(few, treatment=full.treatment))
        assert (kept_in / KEPT_FILE).is_file()
