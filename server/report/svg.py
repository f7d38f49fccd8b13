"""Drawing a figure for a page: one style, text kept as text, the same bytes each time."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fedcore.observability.foreign import foreign
from server.report.markup import MOST_TEXT

# Okabe and Ito's palette, which the colour-blind can tell apart, on white.
BLUE, GREEN, PURPLE, ORANGE = "#0072b2", "#009e73", "#aa4499", "#d55e00"
INK, MUTED, FAINT = "#1f2933", "#5b6470", "#e3e6ea"

WIDTH_IN, HEIGHT_IN = 6.0, 3.9
DRAWABLE = 1e30  # beyond it an axis has no finite limits; no measured figure comes near

_STYLE: Any = {  # matplotlib types its keys as literals from one release to the next only
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the layout is the same anywhere
    "font.size": 10,
    "grid.color": FAINT,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcore",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def draw(name: str, label: str, paint: Callable[[Figure], None], height_in: float) -> str:
    """Paints a figure and returns it as one ``<svg>`` element that scales to its container.

    Args:
        name: Starts every id within, so that several figures can share a page.
        label: What is to be seen, for those who cannot see it.
        paint: Draws on the empty figure.
        height_in: Height in inches; the width is `WIDTH_IN`.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's browser has its own fonts: only the width is guessed where this one has no
        # glyph for a character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_IN, height_in))
        paint(figure)
        buffer = StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _embeddable(buffer.getvalue(), name, label)


def drawable(value: float | None) -> bool:
    """Whether a number has a place on an axis."""
    return value is not None and math.isfinite(value) and abs(value) < DRAWABLE


def shortened(text: str, length: int) -> str:
    """``text`` on one line of at most ``length`` characters."""
    line = foreign(text, MOST_TEXT)
    return line if len(line) <= length else line[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _embeddable(document: str, name: str, label: str) -> str:
    """The ``<svg>`` element of a document, without fixed size and metadata, ids made its own."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    # Ids are looked for inside tags only: text between them may hold anything.
    element = re.sub(r"<[^>]*>", lambda tag: _own_ids(tag.group(), name), element)
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(foreign(label, MOST_TEXT))}">{rest}'.strip()


def _own_ids(tag: str, name: str) -> str:
    tag = re.sub(r' id="', f' id="{name}-', tag)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", tag)
