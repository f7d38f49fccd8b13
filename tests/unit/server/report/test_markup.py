from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.report.markup import Markup, details, digest, join, plot, table, tag


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b> & ", tag("i", "x")) == "<p>&lt;b&gt; &amp; <i>x</i></p>"
    assert tag("a", title='"><script>') == '<a title="&quot;&gt;&lt;script&gt;"></a>'
    assert tag("td", "x", class_="n") == '<td class="n">x</td>'


@given(st.text())
def test_no_text_opens_a_tag(text: str) -> None:
    assert "<" not in join([text])
    assert tag("p", text).count("<") == 2
    assert '"' not in tag("p", title=text).removeprefix('<p title="').removesuffix('"></p>')


def test_a_table_sets_a_row_and_a_column_apart() -> None:
    drawn = table(["name", "why"], [["a", "<x>"], ["b", "y"]], prose="why", highlighted="b")
    assert '<tr><th scope="row">a</th><td class="words">&lt;x&gt;</td></tr>' in drawn
    assert '<tr class="chosen"><th scope="row">b</th>' in drawn
    assert '<th scope="col" class="words">why</th>' in drawn


def test_folded_content_a_plot_and_a_digest() -> None:
    assert details("more", tag("p", "x")) == ("<details><summary>more</summary><p>x</p></details>")
    assert plot(None, "nothing") == ""
    assert plot("<svg></svg>", "a & b") == (
        "<figure><svg></svg><figcaption>a &amp; b</figcaption></figure>"
    )
    assert digest("ab" * 32) == f'<code title="sha256:{"ab" * 32}">abababababab</code>'
    assert isinstance(plot(None, ""), Markup)
