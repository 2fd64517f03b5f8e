"""Streams of text: the pieces are the text, no piece breaks a character, nothing past a stop."""

from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.token_stream import StopStrings, TextStream
from tests.edge_agent.toy_lm import byte_tokenizer

TOKENIZER = byte_tokenizer()


def _letters() -> list[str]:
    """Return the letter that stands for each byte in such tokenizers, as GPT-2 chose them."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


LETTERS = _letters()


def tokens(data: bytes) -> list[int]:
    """Return the tokens of any bytes, of a text or not."""
    return [TOKENIZER.token_to_id(LETTERS[byte]) for byte in data]


@given(st.text(max_size=30))
@example("é€😀é")
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    said = ""
    data = text.encode()
    for place, token in enumerate(tokens(data), start=1):
        piece = stream.push(token)
        said += piece
        if "\ufffd" not in text:  # which looks as a character does that is not whole yet
            assert said == data[:place].decode(errors="ignore")  # at once, not before its time
    said += stream.finish()
    assert said == text


@given(st.lists(st.one_of(st.binary(max_size=6), st.text(max_size=3).map(str.encode))))
@example([b"\xff\xff\xe2\x82", "€".encode()])
@example([b"\xf0\x9f\x98"])
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(parts: list[bytes]) -> None:
    ids = tokens(b"".join(parts))
    stream = TextStream(TOKENIZER)
    said = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert said == TOKENIZER.decode(ids)


@given(
    st.lists(st.text("ab\n", max_size=4)),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    said = "".join([stream.push(piece) for piece in pieces])
    ended = stream.found is not None
    said += stream.finish()
    text = "".join(pieces)
    assert ended == any(stop in text for stop in stops)
    if not ended:
        assert said == text
    else:
        assert text.startswith(said + (stream.found or "nothing"))
        assert not any(stop in said for stop in stops)


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1))
def test_what_cannot_be_a_stop_is_said_at_once(pieces: list[str]) -> None:
    stream = StopStrings(["c", "\n\n"])
    assert [stream.push(piece) for piece in pieces] == pieces
