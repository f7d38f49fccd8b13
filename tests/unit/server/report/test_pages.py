from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup

import server.report
from server.privacy.audit import Audited, SeedBounds, Statement
from server.privacy.audit_report import report_html as audit_html
from server.report.pages import MAX_TEXT, _environment, render
from server.report.parts import Bar, Digest, Table, drawn
from tests.unit.server.privacy.test_audit_report import audited

TEMPLATES = Path(server.report.__file__).with_name("templates")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>",
    "<!--",
    "{{ 7 * 7 }}",
    "{% include 'page.html' %}",
    "&lt;script&gt;",
)


def drawn_by(macro: str, *values: object) -> str:
    """What a macro of ``parts.html`` makes of values."""
    parts = _environment().get_template("parts.html").module
    return str(getattr(parts, macro)(*values))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_never_obeyed(text: str) -> None:
    page = drawn_by("table", Table(["name", text], [[text, text]], prose=text, highlighted=text))
    assert text not in page.replace(str(Markup.escape(text)), "")
    assert page.count(str(Markup.escape(text))) == 3
    assert "49" not in page


@given(st.text())
def test_no_text_opens_a_tag_or_ends_an_attribute(text: str) -> None:
    shown = drawn_by("cell", text)
    assert "<" not in shown
    attribute = drawn_by("digest", text).removeprefix('<code title="sha256:')
    assert attribute.partition('">')[0].count('"') == 0
    assert attribute.count("<") == 1  # of </code>


def test_text_is_bounded_and_on_one_line() -> None:
    assert drawn_by("cell", "a\nb\x1b[31m") == "a b\\x1b[31m"
    assert len(drawn_by("cell", "x" * 10 * MAX_TEXT)) < MAX_TEXT + 100


def test_a_plot_is_the_only_markup_that_passes() -> None:
    figure = drawn("<svg></svg>", "a & <b>")
    assert drawn_by("plot", figure).strip() == (
        "<figure><svg></svg><figcaption>a &amp; &lt;b&gt;</figcaption></figure>"
    )
    assert drawn(None, "nothing") is None
    assert drawn_by("plot", None).strip() == ""


def test_a_table_sets_a_row_and_a_column_apart() -> None:
    page = drawn_by(
        "table",
        Table(["name", "why"], [["a", Digest("ab" * 32)], ["b", Bar(1.5)]], "why", "b"),
    ).replace("\n", "")
    short = f'<code title="sha256:{"ab" * 32}">abababababab</code>'
    assert f'<tr><th scope="row">a</th><td class="words">{short}</td></tr>' in page
    assert '<tr class="chosen"><th scope="row">b</th>' in page
    assert '<span class="share" style="width:1.50rem"></span>' in page
    assert '<th scope="col" class="words">why</th>' in page


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("report.html", title="x")


def test_no_template_turns_escaping_off() -> None:
    """Markup is trusted in one place of the code, and in no template."""
    for template in TEMPLATES.iterdir():
        text = template.read_text()
        assert not {"|safe", "| safe", "autoescape"} & set(text.split()), template.name
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text
    assert _environment().autoescape is True


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_of_an_audit_is_escaped(text: str) -> None:
    one = audited()
    named = Audited(
        Statement(text, one.statement.plan, one.statement.target_delta),
        one.stated,
        (SeedBounds(1, 3.999, 1.2, 1.001),),
        one.confidence,
    )
    page = audit_html([named], [])
    assert f"<h2>{Markup.escape(text)}</h2>" in page
    assert page.count("<script") == 0
