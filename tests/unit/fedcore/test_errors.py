from __future__ import annotations

import pickle
import re

import pytest

from fedcore import errors
from fedcore.cli import Command
from fedcore.errors import FedcoreError

CLASSES: dict[str, type[FedcoreError]] = {
    name: thing
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, FedcoreError)
}
DRAWING = re.findall(
    r"^ {4}((?:\|   |    )*)(?:\|-- |`-- )?(\w+)\b *(\d*)", errors.__doc__ or "", re.M
)


def test_the_drawing_holds_every_error_and_no_other() -> None:
    assert {name for _, name, _ in DRAWING} == set(CLASSES)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "FedcoreError"])
def test_each_error_stands_where_it_is_drawn(name: str) -> None:
    indent, _, code = next(row for row in DRAWING if row[1] == name)
    parents = CLASSES[name].__mro__
    assert issubclass(CLASSES[name], FedcoreError)
    if not indent:
        assert parents[1] is FedcoreError
        assert CLASSES[name].exit_code == int(code)
    else:
        before = DRAWING[: DRAWING.index((indent, name, code))]
        above = [row[1] for row in before if len(row[0]) < len(indent)][-1]
        assert parents[1] is CLASSES[above]
        assert CLASSES[name].exit_code == CLASSES[above].exit_code


def test_families_leave_with_codes_of_their_own() -> None:
    families = [c for c in CLASSES.values() if c.__mro__[1] is FedcoreError]
    codes = [family.exit_code for family in families]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, errors.INTERRUPTED} & set(codes)


@pytest.mark.parametrize("name", CLASSES)
def test_each_error_says_what_it_means(name: str) -> None:
    first, _, _ = (CLASSES[name].__doc__ or "").partition("\n\n")
    assert first.endswith(".")


def test_the_command_line_leaves_with_the_code_of_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedcore import cli

    def run(options: object) -> int:
        raise errors.BudgetExhausted("client 'anna': spent.")

    class Entry:
        name = "spend"

        def load(self) -> Command:
            return Command("spend", lambda parser: None, run)

    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry()])
    assert cli.main(["spend"]) == 5
    assert capsys.readouterr().err == "BudgetExhausted: client 'anna': spent.\n"
    assert cli.main(["spend", "--no-such"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ConfigError: fedcore")
    assert "--no-such" in said


@pytest.mark.parametrize("text", ["a\x1b[2Jb\ud800", "two\n  lines\r\n", "\u202e", "x" * 10**6, ""])
def test_whatever_an_error_quotes_it_is_one_paragraph_that_can_be_printed(text: str) -> None:
    said = str(errors.TrustError(f"file: it holds {text}. Nothing was done."))
    assert said.isprintable()
    assert len(said) <= 1800
    assert said.encode().startswith(b"file: it holds ")
    assert said.endswith("Nothing was done.")


def test_the_text_of_an_error_survives_a_process() -> None:
    error = errors.DataError("a  b: 'c'")
    assert str(error) == "a  b: 'c'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
