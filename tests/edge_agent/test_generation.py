"""Generation with a cache against recomputing everything, and how texts end."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from edge_agent.generation import Ended, Ending, LanguageModel, Request, gathered
from edge_agent.sampling import Sampling
from fedloom.errors import Reason, Refused
from fedloom.plans import TOKENIZER_FILE
from tests.edge_agent.toy_lm import (
    LAYOUT,
    MAX_TOKENS,
    PAD,
    STOP,
    ToyLm,
    byte_tokenizer,
    continued,
    logits_after,
    save_toy_lm,
)

PROMPTS = ["a", "Once upon a time", "zwölf Boxkämpfer", "\n\t", "x" * 60]


@pytest.fixture(scope="module")
def toy_lm(tmp_path_factory: pytest.TempPathFactory) -> ToyLm:
    return save_toy_lm(tmp_path_factory.mktemp("lm") / "plan")


@pytest.fixture(scope="module")
def model(toy_lm: ToyLm) -> LanguageModel:
    return load(toy_lm)


def load(toy_lm: ToyLm) -> LanguageModel:
    task = toy_lm.plan.task
    return LanguageModel(toy_lm.folder, task, toy_lm.plan.parameter_count, threads=1)


def write(model: LanguageModel, theta: np.ndarray, prompt: str, request: Request) -> str:
    return gathered(model.generate(theta, prompt, request))[0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_it_writes_what_recomputing_everything_writes(
    toy_lm: ToyLm, model: LanguageModel, prompt: str, scale: float
) -> None:
    theta = np.float32(scale) * toy_lm.theta
    ids = model.encode(prompt)
    expected = continued(theta, ids, MAX_TOKENS - len(ids))
    found = list(model.tokens(theta, ids, Sampling(), MAX_TOKENS - len(ids)))
    assert (found[: found.index(STOP)] if STOP in found else found) == expected
    text, ended = gathered(model.generate(theta, prompt, Request(MAX_TOKENS)))
    assert text == byte_tokenizer().decode(expected)
    assert (ended.prompt_tokens, ended.tokens) == (len(ids), len(expected))
    assert ended.ending is (Ending.STOP if STOP in found else Ending.LENGTH)


def test_adapters_write_differently_with_one_session(toy_lm: ToyLm, model: LanguageModel) -> None:
    texts = {write(model, s * toy_lm.theta, "a", Request(20)) for s in np.float32([0, 1, 2])}
    assert len(texts) == 3


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_prompt_in_parts_leads_to_the_same_logits(
    toy_lm: ToyLm, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr("edge_agent.generation._PREFILL_TOKENS", cut)
    ids = model.encode("Once upon a time")
    logits, cache = model.prefill(toy_lm.theta, ids)
    np.testing.assert_allclose(logits, logits_after(toy_lm.theta, ids), rtol=1e-4, atol=1e-4)
    assert {values.shape[2] for values in cache.values()} == {len(ids)}


def test_what_a_tokenizer_puts_before_a_text_is_before_a_prompt_and_nothing_after_it(
    tmp_path: Path,
) -> None:
    toy_lm = save_toy_lm(tmp_path / "plan")
    bare = load(toy_lm).encode("ab")
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(toy_lm.folder / TOKENIZER_FILE))
    model = load(toy_lm)
    assert model.encode("ab") == [1, *bare]
    assert model.encode("") == [1]
    tokenizer = byte_tokenizer()
    tokenizer.save(str(toy_lm.folder / TOKENIZER_FILE))
    assert load(toy_lm).encode("") == [PAD]


def test_a_seed_repeats_a_text_and_another_one_does_not(
    toy_lm: ToyLm, model: LanguageModel
) -> None:
    def drawn(seed: int) -> str:
        return write(model, toy_lm.theta, "a", Request(30, Sampling(2.0, seed=seed)))

    texts = [drawn(seed) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_text_before_it(toy_lm: ToyLm, model: LanguageModel) -> None:
    whole = write(model, toy_lm.theta, "a", Request(30))
    assert len(whole) > 6
    stop = whole[4:6]
    text, ended = gathered(model.generate(toy_lm.theta, "a", Request(30, stop=(stop, "no such"))))
    assert text == whole[: whole.index(stop)]
    assert ended.ending is Ending.STOP
    assert ended.tokens < 30


def test_pieces_come_before_the_text_is_whole(toy_lm: ToyLm, model: LanguageModel) -> None:
    pieces = list(model.generate(toy_lm.theta, "a", Request(30)))
    assert isinstance(pieces[-1], Ended)
    assert len(pieces) > 5
    assert all(isinstance(piece, str) and piece for piece in pieces[:-1])


def test_a_text_is_no_longer_than_asked_or_than_the_model_holds(
    toy_lm: ToyLm, model: LanguageModel
) -> None:
    for most, prompt in ((1, "a"), (5, "a"), (MAX_TOKENS, "x" * (MAX_TOKENS - 2))):
        _, ended = gathered(model.generate(toy_lm.theta, prompt, Request(most)))
        assert ended.tokens <= min(most, MAX_TOKENS - len(prompt))
    with pytest.raises(Refused, match="fewer than 64 tokens"):
        write(model, toy_lm.theta, "x" * MAX_TOKENS, Request())


def test_a_prompt_is_filled_from_a_text_or_from_columns(tmp_path: Path) -> None:
    one = load(save_toy_lm(tmp_path / "one", prompt="Q: {question}\nA:"))
    assert one.prompt("why?") == one.prompt({"question": "why?"}) == "Q: why?\nA:"
    two = load(save_toy_lm(tmp_path / "two", prompt="{who} to {whom}: "))
    assert two.prompt({"who": "I", "whom": "you"}) == "I to you: "
    assert load(save_toy_lm(tmp_path / "fixed", prompt="Story: ")).prompt("once") == "Story: once"
    for model, given in ((two, "text"), (two, {"who": "I"}), (one, {"other": "x"})):
        with pytest.raises(Refused, match="columns"):
            model.prompt(given)


def test_a_braced_value_is_not_filled_again(tmp_path: Path) -> None:
    two = load(save_toy_lm(tmp_path / "two", prompt="{a}{b}"))
    assert two.prompt({"a": "{b}", "b": "x"}) == "{b}x"
    assert len(LAYOUT) == 2


@pytest.mark.parametrize(
    "values", [{"max_tokens": 0}, {"max_tokens": 1 << 20}, {"stop": ("",)}, {"stop": ("x",) * 17}]
)
def test_requests_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(Refused) as caught:
        Request(**values)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MALFORMED
