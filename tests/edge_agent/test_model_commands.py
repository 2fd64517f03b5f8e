"""`infer`, `models` and `bench` as a person types them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.app import main
from edge_agent.model_versions import Candidate, ModelMaker
from edge_agent.speed import Timings, without_adapter
from fedloom.exports import export_model
from tests.edge_agent.devices import joined
from tests.edge_agent.toy import LABELS, PARAMETERS, Toy
from tests.edge_agent.toy_lm import RANK, WIDTH, ToyLm, byte_tokenizer, continued, save_toy_lm
from tests.edge_agent.toy_tasks import save_sums, save_tagger


@pytest.fixture
def maker(tmp_path: Path) -> ModelMaker:
    """A device that has joined and made nothing yet."""
    identity = joined(tmp_path / "home")
    folder = tmp_path / "home" / "models"
    return ModelMaker(folder, identity.agent_id, identity.identity_key)


@pytest.fixture
def toy_lm(tmp_path: Path) -> ToyLm:
    return save_toy_lm(tmp_path / "lm")


def add(maker: ModelMaker, toy: Toy, label: int, refused: str = "") -> None:
    theta = np.zeros(PARAMETERS, np.float32)
    theta[PARAMETERS - len(LABELS) + label] = 5.0
    maker.add(Candidate(toy.folder, toy.plan, theta, bytes(16), label + 1, refused=refused))


class Typed:
    """Types commands on the device."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._home = home
        self._capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Return what was printed: on stderr where the command fails."""
        with pytest.raises(SystemExit) as ended:
            main(["--home", str(self._home), *map(str, arguments)])
        out, err = self._capsys.readouterr()
        assert ended.value.code == code, err
        return out if code == 0 else err

    def rows(self, *arguments: object) -> list[dict[str, object]]:
        """Return the JSON lines that a command prints."""
        return [json.loads(line) for line in self("--json", *arguments).splitlines()]


@pytest.fixture
def typed(
    maker: ModelMaker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Typed:
    # It is the process's, and would outlive the stream that stderr is in this test.
    monkeypatch.setattr("edge_agent.app.configure_logs", lambda *_: None)
    return Typed(maker.folder.parent, capsys)


def test_a_rollback_stays_until_newer_ones_are_followed(
    typed: Typed, maker: ModelMaker, toy: Toy
) -> None:
    for label in (0, 1):
        add(maker, toy, label)
    add(maker, toy, 2, refused="expected an accuracy of at least 90.00%, found 40.00%")
    states = [(row["version"], row["state"]) for row in typed.rows("models", "list")]
    assert states == [(1, "kept"), (2, "active"), (3, "refused")]
    assert "found 40.00%" in typed("models", "list")
    assert typed.rows("infer", "lamp")[0]["label"] == LABELS[1]
    [row] = typed.rows("models", "rollback")
    assert (row["version"], row["state"]) == (1, "active, held")
    add(maker, toy, 2)
    assert typed.rows("infer", "lamp")[0]["label"] == LABELS[0]
    assert "no older" not in typed("models", "rollback", "--adapter", "toy", "2")
    assert typed.rows("infer", "lamp")[0]["label"] == LABELS[1]
    assert typed.rows("models", "follow")[0]["version"] == 4
    assert typed.rows("infer", "lamp")[0]["label"] == LABELS[2]


def test_what_cannot_answer_is_not_rolled_back_to(
    typed: Typed, maker: ModelMaker, toy: Toy
) -> None:
    assert "finish a round" in typed("infer", "lamp", code=2)
    assert "expected one of []" in typed("models", "rollback", code=2)
    add(maker, toy, 0, refused="too bad")
    assert "found none" in typed("models", "rollback", code=2)
    assert "too bad" in typed("models", "rollback", "1", code=1)
    assert typed("models", "rollback", "7", code=1)
    assert "'other'" in typed("models", "rollback", "--adapter", "other", code=2)


def test_several_adapters_are_told_apart_by_name(
    typed: Typed, maker: ModelMaker, toy: Toy, toy_lm: ToyLm
) -> None:
    add(maker, toy, 1)
    maker.add(Candidate(toy_lm.folder, toy_lm.plan, toy_lm.theta, bytes(16), 1))
    assert "['reply', 'toy']" in typed("infer", "lamp", code=2)
    assert LABELS[1] in typed("infer", "--adapter", "toy", "lamp")
    assert typed.rows("infer", "--adapter", "reply", "a")[0]["input"] == "a"


def test_texts_come_from_arguments_files_and_stdin(
    typed: Typed, maker: ModelMaker, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(maker, toy, 1)
    lines, objects = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    lines.write_text("lamp\n\nrain\n")
    objects.write_text('"lamp"\n{"text": "rain"}\n')
    monkeypatch.setattr("sys.stdin", ["lamp\n", "\n", "rain\n"])
    for asked in (["lamp", "rain"], ["--file", lines], ["--file", objects], []):
        rows = typed.rows("infer", "--top", 2, *asked)
        assert [row["input"] for row in rows] == ["lamp", "rain"]
        assert all(row["label"] == LABELS[1] and len(row["probabilities"]) == 2 for row in rows)
    objects.write_text("{\n")
    assert "line 1" in typed("infer", "--file", objects, code=2)
    lines.write_bytes(b"\xff\n")
    assert "UTF-8" in typed("infer", "--file", lines, code=2)
    assert "cannot be read" in typed("infer", "--file", tmp_path / "none", code=2)


def test_a_language_model_writes(typed: Typed, maker: ModelMaker, toy_lm: ToyLm) -> None:
    maker.add(Candidate(toy_lm.folder, toy_lm.plan, toy_lm.theta, bytes(16), 1))
    ids = byte_tokenizer().encode("a").ids
    expected = byte_tokenizer().decode(continued(toy_lm.theta, ids, 20))
    assert typed("infer", "--max-tokens", 20, "a") == expected + "\n"
    [row] = typed.rows("infer", "--max-tokens", 20, "a")
    assert row["text"] == expected
    options = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--seed", 3)
    first, second = (typed.rows("infer", *options, "a") for _ in range(2))
    assert first == second
    stop = expected[2]
    assert typed("infer", "--stop", stop, "a") == expected[: expected.index(stop)] + "\n"
    assert "temperature" in typed("infer", "--temperature", -1, "a", code=1)


def test_a_device_asks_with_the_prompt_that_it_trains_with(
    typed: Typed, maker: ModelMaker, toy_lm: ToyLm, tmp_path: Path
) -> None:
    maker.add(Candidate(toy_lm.folder, toy_lm.plan, toy_lm.theta, bytes(16), 1))
    config = maker.folder.parent / "agent.toml"
    config.write_text("[data]\npath = 'a.jsonl'\nprompt = 'Q: {q} A:'\nanswer = '{r}'\n")
    ids = byte_tokenizer().encode("Q: why? A:").ids
    expected = byte_tokenizer().decode(continued(toy_lm.theta, ids, 20))
    objects = tmp_path / "rows.jsonl"
    objects.write_text('{"q": "why?"}\n')
    for given in (["why?"], ["--file", objects]):
        [row] = typed.rows("infer", "--max-tokens", 20, *given)
        assert row["text"] == expected
    config.write_text("[data]\npath = 'a.jsonl'\nprompt = '{p}: {q} A:'\nanswer = '{r}'\n")
    [row] = typed.rows("infer", "--max-tokens", 20, '{"p": "Q", "q": "why?"}')
    assert row["text"] == expected
    assert "JSON" in typed("infer", "why?", code=2)


def test_a_folder_that_is_named_answers_for_every_task(typed: Typed, tmp_path: Path) -> None:
    save_tagger(tmp_path / "tagger")
    out = typed("infer", "--model", tmp_path / "tagger", "in New York")
    assert "place 'New York' 3..11" in out
    [row] = typed.rows("infer", "--model", tmp_path / "tagger", "in New York")
    assert row["entities"][0]["end"] == 11
    save_sums(tmp_path / "sums")
    arrays = '{"left": [[1, 2, 3], [0, 0, 0]], "right": 2}'
    assert typed("infer", "--model", tmp_path / "sums", arrays) == "6 20\n"
    assert "JSON" in typed("infer", "--model", tmp_path / "sums", "6", "x", code=2)


def test_an_endpoint_that_others_reach_has_to_be_asked_for(
    typed: Typed, maker: ModelMaker, toy: Toy
) -> None:
    add(maker, toy, 0)
    assert "--allow-remote" in typed("infer", "--serve", "--host", "0.0.0.0", code=2)  # noqa: S104


def test_status_names_what_answers(typed: Typed, maker: ModelMaker, toy: Toy) -> None:
    home = maker.folder.parent
    (home / "agent.toml").write_text('[data]\npath = "train.csv"\n')
    add(maker, toy, 0)
    assert "toy 1 (round 1 of run 00000000)" in typed("status")
    assert json.loads(typed("--json", "status"))["models"] == "toy 1 (round 1 of run 00000000)"


def test_bench_measures_what_there_is(
    typed: Typed, maker: ModelMaker, toy: Toy, toy_lm: ToyLm, tmp_path: Path
) -> None:
    [figures] = typed.rows("bench", "--plan", toy.folder, "--seconds", 0.01)
    assert set(figures) == {"start", "training"}
    assert figures["training"]["train_tokens_per_s"] > 0
    add(maker, toy, 0)
    [figures] = typed.rows("bench", "--seconds", 0.01)
    assert set(figures) == {"start", "base", "adapter"}
    assert figures["adapter"]["latency_p50_ms"] <= figures["adapter"]["latency_p95_ms"]
    export_model(toy_lm.folder, toy_lm.plan, toy_lm.theta, tmp_path / "out")
    out = typed("bench", "--model", tmp_path / "out", "--seconds", 0.01)
    assert "decode_tokens_per_s" in out
    save_sums(tmp_path / "sums")
    assert typed.rows("bench", "--model", tmp_path / "sums", "--seconds", 0.01)
    (maker.path("toy", 1) / "version.sig").write_bytes(bytes(64))
    assert "expected an active version" in typed("bench", code=2)


def test_the_base_model_is_the_adapter_with_nothing_in_b(toy_lm: ToyLm) -> None:
    base = without_adapter(toy_lm.plan, toy_lm.theta)
    np.testing.assert_array_equal(base[: RANK * WIDTH], toy_lm.theta[: RANK * WIDTH])
    assert not base[RANK * WIDTH :].any()
    assert toy_lm.theta[RANK * WIDTH :].any()
    assert continued(base, [5], 20) == continued(np.zeros_like(base), [5], 20)


def test_quantiles_and_rates_are_those_of_the_times() -> None:
    found = Timings(tuple(i / 1000 for i in range(1, 102)))
    assert found.quantile(0.5) == pytest.approx(0.051)
    assert found.quantile(0.95) == pytest.approx(0.096)
    assert found.rate(51) == pytest.approx(1000)


def test_a_renamed_plan_makes_another_adapter(typed: Typed, maker: ModelMaker, toy: Toy) -> None:
    add(maker, toy, 0)
    add(maker, replace(toy, plan=replace(toy.plan, name="Intent 2")), 0)
    assert {row["adapter"] for row in typed.rows("models", "list")} == {"toy", "Intent-2"}
