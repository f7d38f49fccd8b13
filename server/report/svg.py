"""Rendering of a matplotlib figure as embeddable SVG: one style, real text, reproducible bytes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.figure import Figure

from fedcore.observability.foreign import foreign
from server.report.pages import MAX_TEXT

# Okabe and Ito's palette for colour-blind readers, on white.
BLUE, GREEN, PURPLE, ORANGE = "#0072b2", "#009e73", "#aa4499", "#d55e00"
INK, MUTED, FAINT = "#1f2933", "#5b6470", "#e3e6ea"

WIDTH_IN, HEIGHT_IN = 6.0, 3.9
DRAWABLE = 1e30  # larger values break axis limits; no measured figure comes near

_STYLE: Any = {  # matplotlib types the keys as literals, which change between releases
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: equal layout everywhere
    "font.size": 10,
    "grid.color": FAINT,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcore",
    "text.color": INK,
    "text.parse_math": False,  # dollar signs in names are literal
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def draw(name: str, label: str, paint: Callable[[Figure], None], height_in: float) -> str:
    """Draws a figure and returns it as one ``<svg>`` element that scales to its container.

    Args:
        name: Prefix of all element ids, so that several figures can share a page.
        label: Alternative text for screen readers.
        paint: Callback that draws on the empty figure.
        height_in: Height in inches; the width is `WIDTH_IN`.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's browser has its own fonts: a glyph missing here affects only the estimated
        # width.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_IN, height_in))
        paint(figure)
        buffer = StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _embeddable(buffer.getvalue(), name, label)


def drawable(value: float | None) -> bool:
    """Returns whether a number can be drawn on an axis."""
    return value is not None and math.isfinite(value) and abs(value) < DRAWABLE


def shortened(text: str, length: int) -> str:
    """Returns ``text`` on one line of at most ``length`` characters, with an ellipsis if cut."""
    line = foreign(text, MAX_TEXT)
    return line if len(line) <= length else line[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _embeddable(document: str, name: str, label: str) -> str:
    """Extracts the ``<svg>`` element, without fixed size and metadata, and with prefixed ids."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    # Replace ids only inside tags: text between tags is arbitrary.
    element = re.sub(r"<[^>]*>", lambda tag: _own_ids(tag.group(), name), element)
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(foreign(label, MAX_TEXT))}">{rest}'.strip()


def _own_ids(tag: str, name: str) -> str:
    tag = re.sub(r' id="', f' id="{name}-', tag)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", tag)
