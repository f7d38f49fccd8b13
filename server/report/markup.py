"""Safe construction of HTML: any string that isn't `Markup` is text, and is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fedcore.observability.foreign import foreign

MOST_TEXT = 20_000
"""Maximum number of characters of one text in a report."""


class Markup(str):
    """Trusted HTML made by this module, in contrast to text from elsewhere."""

    __slots__ = ()


def tag(name: str, *content: str, **attributes: str) -> Markup:
    """Returns an element; use ``class_`` for the attribute ``class``, a Python keyword.

    >>> tag("td", "<b>", class_="number")
    '<td class="number">&lt;b&gt;</td>'
    """
    written = "".join(
        f' {key.rstrip("_")}="{escape(foreign(value, MOST_TEXT))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Concatenates parts, and escapes those that are text."""
    return Markup("".join(_safe(part) for part in parts))


def _safe(part: str) -> str:
    if isinstance(part, Markup):
        return part
    lead = " " if part[:1].isspace() else ""  # keeps spaces between elements
    trail = " " if part[-1:].isspace() else ""
    return escape(f"{lead}{foreign(part, MOST_TEXT)}{trail}")


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    prose: str = "",
    highlighted: str | None = None,
) -> Markup:
    """Returns a table that scrolls sideways if it is too wide.

    Args:
        headings: One heading per column; the first column names the rows.
        rows: Rows of cells, as many as headings.
        prose: The heading of a text column, which is wrapped and left-aligned.
        highlighted: Name of the row to highlight.
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
    """Returns content that is collapsed until its title is clicked."""
    return tag("details", tag("summary", title), *content)


def plot(svg: str | None, caption: str) -> Markup:
    """Returns a figure with a caption; empty if there is no plot."""
    if svg is None:
        return Markup()
    return tag("figure", Markup(svg), tag("figcaption", caption))


def digest(sha256: str) -> Markup:
    """Returns a shortened digest, with the full value as its tooltip."""
    return tag("code", sha256[:12], title=f"sha256:{sha256}")
