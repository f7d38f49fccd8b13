"""HTML that is safe by construction: whatever is not `Markup` is text, and is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fedcore.observability.foreign import foreign

MOST_TEXT = 20_000
"""Characters of one text in a report."""


class Markup(str):
    """HTML made here, as against text that came from somewhere."""

    __slots__ = ()


def tag(name: str, *content: str, **attributes: str) -> Markup:
    """An element; ``class_`` stands for the attribute that Python cannot name.

    >>> tag("td", "<b>", class_="number")
    '<td class="number">&lt;b&gt;</td>'
    """
    written = "".join(
        f' {key.rstrip("_")}="{escape(foreign(value, MOST_TEXT))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other, text among them escaped."""
    return Markup("".join(_safe(part) for part in parts))


def _safe(part: str) -> str:
    if isinstance(part, Markup):
        return part
    lead = " " if part[:1].isspace() else ""  # text may stand between elements
    trail = " " if part[-1:].isspace() else ""
    return escape(f"{lead}{foreign(part, MOST_TEXT)}{trail}")


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    prose: str = "",
    highlighted: str | None = None,
) -> Markup:
    """A table that scrolls sideways where it is too wide.

    Args:
        headings: One for each column; the first column names the rows.
        rows: Their cells, as many as headings.
        prose: The heading of a column of words, which are wrapped and stand to the left.
        highlighted: The row of this name is set apart.
    """
    head = tag(
        "tr",
        *(
            tag("th", heading, scope="col", **({"class_": "words"} if heading == prose else {}))
            for heading in headings
        ),
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(
                tag("td", cell, **({"class_": "words"} if heading == prose else {}))
                for heading, cell in zip(headings[1:], row[1:], strict=True)
            ),
            **({"class_": "chosen"} if row[0] == highlighted else {}),
        )
        for row in rows
    ]
    drawn = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", drawn, class_="wide")


def details(title: str, *content: str) -> Markup:
    """Content that is folded away until its title is clicked."""
    return tag("details", tag("summary", title), *content)


def plot(svg: str | None, caption: str) -> Markup:
    """A plot on its card; nothing where there is none."""
    if svg is None:
        return Markup()
    return tag("figure", Markup(svg), tag("figcaption", caption))


def digest(sha256: str) -> Markup:
    """A digest shortened, the whole of it where the pointer rests."""
    return tag("code", sha256[:12], title=f"sha256:{sha256}")
