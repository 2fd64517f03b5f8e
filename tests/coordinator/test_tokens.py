"""The enrolment token: one line that reads back exactly, and that no error repeats."""

import base64
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import Reason, Refused
from fedloom.tokens import SECRET_BYTES, EnrolmentToken, parse_token
from fedloom.v1 import enrolment_pb2

SECRET = b"the secret of the kitchen device"
TOKEN = EnrolmentToken("coordinator.example:7072", SECRET, bytes(range(200)))
TEXT = TOKEN.encode()
_hosts = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,40}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map("[{}]".format),
)


def refused(text: str) -> Refused:
    with pytest.raises(Refused) as caught:
        parse_token(text)
    return caught.value


@given(
    st.builds("{}:{}".format, _hosts, st.integers(1, 65_535)),
    st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
    st.binary(min_size=1, max_size=2000),
)
def test_a_token_reads_back(address: str, secret: bytes, certificate: bytes) -> None:
    token = EnrolmentToken(address, secret, certificate)
    text = token.encode()
    assert text.isascii()
    assert text.split() == [text]
    assert parse_token(text) == token
    assert parse_token(f"  {text}\r\n") == token  # as it is pasted


@pytest.mark.parametrize("length", range(len(TEXT)))
def test_a_token_cut_short_is_refused(length: int) -> None:
    assert refused(TEXT[:length]).reason is Reason.INVALID_TOKEN


def test_the_end_of_a_token_is_refused() -> None:
    for start in range(1, len(TEXT)):
        assert refused(TEXT[start:]).reason is Reason.INVALID_TOKEN


@given(st.text(max_size=100) | st.text("abcXYZ019-_=+/ ", max_size=100))
def test_garbage_is_refused(text: str) -> None:
    assert refused(text).reason is Reason.INVALID_TOKEN
    assert refused(f"fl1_{text}").reason is Reason.INVALID_TOKEN


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_a_changed_character_is_refused_or_another_token(place: int, character: str) -> None:
    text = TEXT[:place] + character + TEXT[place + 1 :]
    try:
        parse_token(text)
    except Refused as refusal:
        assert refusal.reason is Reason.INVALID_TOKEN  # noqa: PT017 - both outcomes are allowed


@pytest.mark.parametrize(
    "fields",
    [
        {"secret": b""},
        {"secret": SECRET[:-1]},
        {"secret": SECRET + b"x"},
        {"address": ""},
        {"address": "coordinator.example"},
        {"address": "coordinator.example:"},
        {"address": ":7072"},
        {"address": "[]:7072"},
        {"address": "::1:7072"},
        {"address": "coordinator.example:0"},
        {"address": "coordinator.example:65536"},
        {"address": "coordinator.example:\uff17072"},  # a digit, and none of ASCII
        {"address": "[coordinator.example]:7072"},
        {"address": "coordinator .example:7072"},
        {"authority_certificate": b""},
    ],
    ids=str,
)
def test_a_token_with_a_wrong_field_is_refused(fields: dict[str, str]) -> None:
    whole = {"address": TOKEN.address, "secret": SECRET, "authority_certificate": b"DER"}
    message = enrolment_pb2.EnrolmentToken(**(whole | fields))  # type: ignore[arg-type]
    body = base64.urlsafe_b64encode(message.SerializeToString()).rstrip(b"=").decode()
    assert refused(f"fl1_{body}").reason is Reason.INVALID_TOKEN


def test_a_token_too_long_to_be_one_is_refused_unread() -> None:
    assert "100004 characters" in refused("fl1_" + "A" * 100_000).subject


def test_no_text_shows_the_secret() -> None:
    body = TEXT.removeprefix("fl1_")
    texts = [repr(TOKEN), str(TOKEN), f"{TOKEN}", repr([TOKEN])]
    for broken in (TEXT[:-1], TEXT[1:], f"fl1_{body[::-1]}", TEXT + "!"):
        error = refused(broken)
        texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert "coordinator.example" in repr(TOKEN)
    for text in texts:
        assert SECRET.decode() not in text
        assert SECRET.hex() not in text
        assert body[20:60] not in text
        assert body[::-1][20:60] not in text
