"""Nothing that a terminal obeys reaches it, whatever the names of runs and devices are."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.commands.output import age, safe, say_table

HOSTILE = [
    ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
    ("a\nb\rc\td", r"a\nb\rc\td"),
    ("\u202egnp.exe", r"\u202egnp.exe"),  # right-to-left override
    ("\u2028\x85\x9b31m", r"\u2028\x85\x9b31m"),
    ("\udcff", r"\udcff"),  # a byte of a file's name that is no UTF-8
    ("[bold]küche[/bold] 厨房", "[bold]küche[/bold] 厨房"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert safe(text) == shown


@given(st.text())
def test_what_is_shown_is_printable_and_printable_text_is_shown_as_it_is(text: str) -> None:
    shown = safe(text)
    assert shown.isprintable()
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert text != shown or text.isprintable()
    assert safe(shown) == shown


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_a_table_holds_the_same_and_no_markup(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say_table(("name", "other"), [(text, "x")])
    heading, row = capsys.readouterr().out.splitlines()
    assert (heading.split(), row.rstrip()) == (["name", "other"], f"{shown}  x")


def test_a_row_stays_on_one_line_where_a_program_reads_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_table(("a", "b"), [("x" * 300, "y" * 300), ("1", "2")])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_empty_table_says_so_apart_from_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("a",), [])
    assert capsys.readouterr() == ("", "none\n")


@pytest.mark.parametrize(
    ("then", "told"),
    [
        *[(None, "never"), (100.0, "0 s ago"), (41.0, "59 s ago"), (-20.0, "2 min ago")],
        *[(-7100.0, "2 h ago"), (-999_900.0, "12 d ago"), (160.0, "in 1 min")],
    ],
)
def test_ages(then: float | None, told: str) -> None:
    assert age(then, 100.0) == told
