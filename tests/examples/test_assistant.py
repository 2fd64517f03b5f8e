"""The assistant on a toy base: both plans share it, both adapters answer, one is swapped."""

from pathlib import Path

import numpy as np
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans import PlanRequest, build_plan
from edge_agent.model_versions import Active, Candidate, ModelMaker
from edge_agent.shared_members import link_known_members
from examples.assistant import rows
from examples.assistant.base import Recipe, save_base
from examples.assistant.device import INTENT, REPLY, Assistant
from examples.assistant.notes import Note, Notes
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Plan

TOY = Recipe(steps=2, batch=2, vocabulary=300, width=16, layers=1)
TEXTS = [("Turn on the lamp in the den", "lights_on"), ("Play some jazz", "play_music")]
REQUESTS = {
    INTENT: {"labels": rows.LABELS, "max_tokens": 48},
    REPLY: {"task": "causal-lm", "prompt": rows.PROMPT, "answer": rows.ANSWER},
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory, pytestconfig) -> dict[str, tuple[Path, Plan]]:
    """Both plans, in a folder as an agent has them."""
    folder = tmp_path_factory.mktemp("assistant")
    save_base(rows.public_texts(TEXTS), rows.sayings(), folder / "base", TOY, lambda _: None)
    found = {}
    cache = pytestconfig.cache.mkdir("graphs")
    for name, own in REQUESTS.items():
        request = PlanRequest(model=str(folder / "base"), name=name, rank=2, **own)
        out = folder / "plans" / name
        found[name] = (out, build_plan(request, out, lambda _: None, cache))
    return found


@pytest.fixture
def device(plans, tmp_path) -> Assistant:
    """A device with two versions of each adapter; the first of the reply's answers."""
    maker = ModelMaker(tmp_path / "models", "agent", Ed25519PrivateKey.generate())
    (reply_folder, reply_plan) = plans[REPLY]
    (reply_folder / BASE_FILE).unlink(missing_ok=True)  # as before it was fetched
    link_known_members(reply_plan, reply_folder)
    for folder, plan in plans.values():
        theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
        noise = np.random.default_rng(1).normal(0, 0.5, theta.shape).astype(np.float32)
        for round_number, values in enumerate((theta, theta + noise), 1):
            maker.add(Candidate(folder, plan, values, bytes(16), round_number))
    maker.activate(REPLY, Active(1))
    return Assistant(maker, rows.device_notes(1))


@pytest.mark.timeout(600)
def test_two_adapters_answer_on_one_base(device) -> None:
    answer = device.answer("Turn on the lamp")
    assert answer.label in rows.LABELS
    assert 1 / len(rows.LABELS) <= answer.probability <= 1
    assert any(note.text == answer.note for note in rows.device_notes(1))
    assert answer.versions == (2, 1)
    assert device.base_is_shared


@pytest.mark.timeout(600)
def test_an_adapter_is_swapped_without_reload(device) -> None:
    before, old = device.library.adapter(REPLY), device.answer("Play some jazz")
    device.versions.activate(REPLY, Active(2))
    with structlog.testing.capture_logs() as logs:
        new = device.answer("Play some jazz")
    after = device.library.adapter(REPLY)
    assert [log for log in logs if log["event"] == "adapter replaced"] == [
        {"adapter": REPLY, "version": 2, "event": "adapter replaced", "log_level": "info"}
    ]
    assert after.model is before.model
    assert (old.versions, new.versions) == ((2, 1), (2, 2))
    assert not np.array_equal(after.theta, before.theta)
    assert new.reply != old.reply


def test_no_note_of_a_device_is_public() -> None:
    own = {note.text for number in (1, 2, 3) for note in rows.device_notes(number)}
    public = " ".join(prompt + answer for prompt, answer in rows.public_texts(TEXTS * 50))
    assert not [note for note in own if note in public]


def test_one_file_serves_both_plans(tmp_path) -> None:
    path, notes = tmp_path / "rows.csv", rows.device_notes(1)
    rows.write_rows(TEXTS, notes, path)
    found = rows.read_rows(path)
    assert [(row["text"], row["label"]) for row in found] == TEXTS
    for row in found:
        assert row["reply"] == rows.reply(row["label"], row["note"])
        assert Note(row["label"], row["note"]) in notes


NOTES = [Note(label, text) for label in "ab" for text in ("the red lamp", "a blue door")]


@given(text=st.text(max_size=40), label=st.sampled_from("ab"))
def test_a_note_of_the_intent_goes_first(text: str, label: str) -> None:
    assert Notes(NOTES).best(text, label).label == label


@pytest.mark.parametrize(("text", "found"), [("Red?", "the red lamp"), ("my DOOR", "a blue door")])
def test_the_nearest_note_is_found(text: str, found: str) -> None:
    assert Notes(NOTES).best(text, "b") == Note("b", found)
