from __future__ import annotations

import io
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedcore.observability.foreign import (
    bounded_line,
    foreign,
    paragraph,
    printable,
    say,
    without_credentials,
)

ANY = st.text(st.characters(), max_size=600)  # surrogates, too


@given(ANY, st.integers(1, 500))
def test_whatever_comes_is_one_short_line_that_can_be_printed(text: str, most: int) -> None:
    shown = foreign(text, most)
    assert shown.isprintable()
    assert len(shown) <= most + 40
    shown.encode()


@given(st.text(st.characters(categories=("L", "N", "P", "S")), max_size=400))
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assume("://" not in text)
    assert foreign(text) == text


@given(ANY)
def test_a_line_is_bounded_in_bytes(text: str) -> None:
    line = bounded_line(text * 10, 500)
    assert len(line.encode()) <= 500
    assert line.isprintable()


@given(ANY)
def test_lines_for_a_person_keep_their_ends_and_nothing_else_that_acts(text: str) -> None:
    shown = printable(text)
    assert all(part.isprintable() for part in shown.replace("\t", "").split("\n"))
    assert shown.count("\n") == text.count("\n")


def test_ends_of_lines_and_runs_of_blanks_are_one_blank() -> None:
    assert foreign(" two\r\n\tlines ") == "two lines"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00b", "a\\x00b"),
        ("\ud83d", "\\ud83d"),
        ("\u2066x", "\\u2066x"),
        ("\U000e0041", "\\U000e0041"),
        ("Zürich 東京", "Zürich 東京"),
    ],
)
def test_what_acts_is_written_as_python_writes_it(text: str, shown: str) -> None:
    assert foreign(text) == shown


def test_an_object_that_has_no_text_is_named_by_its_type() -> None:
    class Broken:
        def __str__(self) -> str:
            raise OSError

    assert foreign(Broken()) == "a Broken"
    assert foreign(ValueError("x\x1b")) == "x\\x1b"


def test_json_that_is_printed_is_what_was_made() -> None:
    out = io.StringIO()
    value = {"name": "\x1b\ud800", "rows": [1, 2]}
    say(json.dumps(value, indent=2), to=out)
    assert json.loads(out.getvalue()) == value


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://me:hunter2@bucket/x", "s3://***@bucket/x"),
        ("s3://me:hunter2/hunter2+@bucket/x", "s3://***@bucket/x"),
        ("https://me:hunter2@hunter2@host:443/a", "https://***@host:443/a"),
        ("https://hunter2@host", "https://***@host"),
        ("https://host/x?token=hunter2", "https://host/x?***"),
        ("a::s3://me:hunter2@bucket", "a::s3://***@bucket"),
        ("https://host/team@x and me@host.org", "https://host/team@x and me@host.org"),
    ],
)
def test_credentials_in_an_address_are_masked(address: str, shown: str) -> None:
    assert without_credentials(address) == shown
    texts = [
        way(f"release.push = '{address}': wrong") for way in (foreign, bounded_line, paragraph)
    ]
    assert texts == [f"release.push = '{shown}': wrong"] * 3


def test_a_long_text_of_addresses_is_masked_in_linear_time() -> None:
    assert len(without_credentials("a://" * 200_000)) == 800_000
