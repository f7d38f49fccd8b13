"""The parts of a page as data; the macros in ``templates/parts.html`` draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup


@dataclass(frozen=True)
class Digest:
    """A SHA-256 digest, shown shortened, with the full value as its tooltip."""

    sha256: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar that shows a share."""

    width_rem: float


Cell = str | Digest | Bar
"""Content of a table's cell, or of a line."""


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways if it is too wide; the first column names the rows."""

    headings: Sequence[str]
    """One heading per column."""
    rows: Sequence[Sequence[Cell]]
    """Rows of cells, as many as headings."""
    prose: str = ""
    """The heading of a text column, which is wrapped and left-aligned."""
    highlighted: str | None = None
    """Name of the row to highlight."""


class Card(NamedTuple):
    """A headline figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class LineageStep:
    """A link of the chain from the data to the release."""

    title: str
    lines: tuple[Cell, ...]
    absent: bool = False
    """Whether the run did without this step."""


@dataclass(frozen=True)
class DrawnPlot:
    """A plot with its caption."""

    svg: Markup
    caption: str


def drawn(svg: str | None, caption: str) -> DrawnPlot | None:
    """Marks a plot of `server.report.svg.draw` as trusted; None if there is no plot."""
    return None if svg is None else DrawnPlot(Markup(svg), caption)  # noqa: S704
