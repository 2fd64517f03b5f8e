"""The known answers: made again they are the same, and what must be refused is, for its reason."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

import crypto
from crypto import errors, masked, plain
from crypto.bfv import KeyedRing
from crypto.cohort import decode
from crypto.cohort.shamir import recover
from crypto.run_key import ternary_secret

from . import make_vectors

HERE = Path(__file__).parent
NEGATIVE = json.loads((HERE / "negative.json").read_text())


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


@pytest.mark.parametrize("name", make_vectors.GROUPS)
def test_the_committed_vectors_are_what_the_code_makes(name):
    assert json.loads(json.dumps(make_vectors.GROUPS[name]())) == load(name)


def test_every_message_reads_back():
    for name, text in load("messages")["encoded"].items():
        message = decode(bytes.fromhex(text))
        assert type(message).__name__.lower() == name.removeprefix("grouped_")
        assert message.encode().hex() == text


def test_any_three_shares_recover_the_secret():
    vector = load("shares")
    shares = {int(slot): bytes.fromhex(text) for slot, text in vector["shares"].items()}
    for chosen in ((0, 1, 2), (1, 3, 9), (0, 2, 9)):
        assert recover({slot: shares[slot] for slot in chosen}, 3).hex() == vector["secret"]


def test_seal_opens_the_ciphertext_made_by_the_book():
    vector = load("ciphertext")
    secret = ternary_secret(make_vectors.RUN_KEY, make_vectors.RUN_ID)
    ring = KeyedRing(vector["plain_bits"], secret)
    t, q = 1 << vector["plain_bits"], crypto.parameters.MODULUS
    exact = secret.astype(object)
    c0 = -7 * np.concatenate([[-exact[-1]], exact[:-1]])
    for place, m in enumerate(vector["message"]):
        c0[place] += (q * m + t // 2) // t
    c0 = (c0 + 1) % q
    assert [int(c) for c in c0[:4]] == vector["c0_first"]
    c1 = np.zeros(4096, np.uint64)
    c1[1] = 7
    opened = ring.decrypt(ring.ciphertext(np.array([int(c) for c in c0], np.uint64), c1))
    assert opened[:2].tolist() == vector["message"]
    assert not opened[2:].any()


@pytest.mark.parametrize("vector", NEGATIVE, ids=lambda v: v["what"])
def test_what_must_be_refused_is(vector):
    expected = getattr(errors, vector["error"], None)
    if vector["kind"] == "message":
        with pytest.raises(expected):
            decode(bytes.fromhex(vector["bytes"]))
        return
    if vector["kind"] == "plain upload":
        upload = bytearray(make_vectors.plain_upload(vector["form"]))
        for offset, text in vector["edits"]:
            upload[offset : offset + len(text) // 2] = bytes.fromhex(text)
        total = plain.accumulator(make_vectors.plain_context(vector["form"]))
        if expected is None:
            total.add(0, io.BytesIO(upload))
            return
        with pytest.raises(expected) as refused:
            total.add(0, io.BytesIO(upload))
        assert type(refused.value) is expected
        return
    encoded = bytearray((HERE / vector["file"]).read_bytes())
    for offset, text in vector["edits"]:
        encoded[offset : offset + len(text) // 2] = bytes.fromhex(text)
    source = io.BytesIO(encoded[: len(encoded) - vector["cut"]])
    context = make_vectors.context(make_vectors.cohort().digest)
    if expected is None:
        opened = masked.open_sum(context, make_vectors.RUN_KEY, vector["members"], source)
        assert opened.mean.tobytes().hex() == load("sums")["opened_mean"]
        return
    with pytest.raises(expected) as refused:
        masked.open_sum(context, make_vectors.RUN_KEY, vector["members"], source)
    assert type(refused.value) is expected
