"""The plot of the compression candidates: bytes against latency, and which of them were refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from fedcore.observability.words import bytes_text, figure
from server.records import CandidateRecord
from server.report.svg import BLUE, HEIGHT_IN, INK, MUTED, ORANGE, draw, drawable, shortened

_GREY = "#aab2bd"
"""Of what another candidate beats in both respects."""


def candidates_plot(
    candidates: Sequence[CandidateRecord], *, primary: str, chosen: str | None
) -> str | None:
    """Plots each candidate's bytes against its p50 latency, with its metric beside its name.

    Of the candidates that meet every limit, a line joins those of which no other is both as small
    and as fast (the Pareto front), and the others are grey. Refused ones are hollow, with the
    limits that they miss.
    """
    shown = [each for each in candidates if _can_be_drawn(each)]
    if not shown:
        return None
    beaten = dominated(shown)

    def paint(on: Figure) -> None:
        axes = on.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        front = sorted(
            (each for each in shown if each.admitted and each.name not in beaten),
            key=lambda each: each.p50_us,
        )
        axes.plot(
            [each.p50_us for each in front],
            [each.bytes for each in front],
            color=BLUE,
            linewidth=1,
            drawstyle="steps-post",
        )
        for each in shown:
            colour = _colour(each, chosen, beaten)
            axes.plot(_bar(each), [each.bytes] * 2, color=colour, linewidth=1.5)
            axes.scatter(
                [each.p50_us],
                [each.bytes],
                s=90,
                facecolor=colour if each.admitted else "white",
                edgecolor=colour,
                linewidth=1.5,
                alpha=0.9,
                zorder=3,
            )
        _log_axis(axes, "x", [each.p50_us for each in shown], lambda value: f"{value:g}")
        _log_axis(axes, "y", [each.bytes for each in shown], bytes_text)
        axes.set_xlabel("p50 latency, \N{MICRO SIGN}s (bar: medians of repeated blocks)")
        axes.set_ylabel("size of the ONNX file")
        _label_points(on, axes, shown, chosen)

    label = f"Candidates: bytes against latency, with {primary}"
    return draw("candidates", label, paint, 1.3 * HEIGHT_IN)


def dominated(candidates: Sequence[CandidateRecord]) -> set[str]:
    """Returns the names of admitted candidates that another admitted one beats.

    One beats another if it is at least as small and as fast, and smaller or faster.
    """
    admitted = [each for each in candidates if each.admitted]
    return {
        each.name
        for each in admitted
        if any(
            other.bytes <= each.bytes
            and other.p50_us <= each.p50_us
            and (other.bytes, other.p50_us) != (each.bytes, each.p50_us)
            for other in admitted
        )
    }


def _can_be_drawn(each: CandidateRecord) -> bool:
    positive = each.bytes > 0 and each.p50_us > 1e-6
    return positive and all(drawable(value) for value in (each.metric, each.p50_us, each.bytes))


def _colour(each: CandidateRecord, chosen: str | None, beaten: set[str]) -> str:
    if each.name == chosen:
        return ORANGE
    return _GREY if each.name in beaten else BLUE


def _log_axis(
    axes: Axes, which: str, values: Sequence[float], text: Callable[[float], str]
) -> None:
    """Sets limits that span at least a factor of six, and ticks such as 10, 20, 50."""
    middle = math.sqrt(min(values)) * math.sqrt(max(values))
    reach = max(math.sqrt(6), 1.6 * math.sqrt(max(values) / min(values)))
    (axes.set_xlim if which == "x" else axes.set_ylim)(middle / reach, middle * reach)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _label_points(
    on: Figure, axes: Axes, shown: Sequence[CandidateRecord], chosen: str | None
) -> None:
    """Labels the points, each at the nearest position where the label overlaps least."""
    on.draw_without_rendering()  # computes the layout that label positions depend on
    scale = on.dpi / 72  # pixels per point
    frame = axes.get_window_extent()
    taken = [box for each in shown for box in _marks(axes, each, scale)]
    for each in sorted(shown, key=lambda one: one.name != chosen):
        text = _label(each, chosen)
        measured = axes.text(0, 0, text, fontsize=_LABEL_PT)
        extent = measured.get_window_extent()
        measured.remove()
        centre = axes.transData.transform((each.p50_us, each.bytes))
        boxes = [_box(centre, (extent.width, extent.height), place, scale) for place in _PLACES]
        covered = [box.count_overlaps(taken) + (not _within(box, frame)) for box in boxes]
        first = covered.index(min(covered))
        taken.append(boxes[first])
        dx, dy = _PLACES[first]
        label = axes.annotate(
            text,
            (each.p50_us, each.bytes),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=_SIDES[_sign(dx)],
            va=_LEVELS[_sign(dy)],
            fontsize=_LABEL_PT,
            color=ORANGE if each.name == chosen else INK if each.admitted else MUTED,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 5},
        )
        label.set_in_layout(False)


def _label(each: CandidateRecord, chosen: str | None) -> str:
    text = f"{shortened(each.name, 24)}, {figure(each.metric)}"
    if each.name == chosen:
        return f"{text}\nchosen"
    if each.admitted:
        return text
    missed = ", ".join(each.missed)
    return f"{text}\nrefused{missed and ': ' + shortened(missed, 40)}"


_LABEL_PT = 8.5
_SIDES = {-1: "right", 0: "center", 1: "left"}
_LEVELS = {-1: "top", 0: "center", 1: "bottom"}
_PLACES = [
    (dx * far, dy * far)
    for far in (1.0, 2.2, 3.6)
    for dx, dy in ((0, 12), (0, -12), (14, 0), (-14, 0), (10, 10), (-10, 10), (10, -10), (-10, -10))
]
"""Candidate label offsets from the marker, in points, nearest first."""


def _box(
    centre: NDArray[np.float64], size: tuple[float, float], place: tuple[float, float], scale: float
) -> Bbox:
    """Returns the pixel box of a label of ``size`` at ``place``; its near side is the anchor."""
    corner = [
        middle + offset * scale + extent * (_sign(offset) - 1) / 2
        for middle, offset, extent in zip(centre, place, size, strict=True)
    ]
    return Bbox.from_bounds(corner[0], corner[1], size[0], size[1])


def _marks(axes: Axes, each: CandidateRecord, scale: float) -> list[Bbox]:
    """Returns the boxes in pixels of a candidate's marker and error bar."""
    low, high = _bar(each)
    x, y = axes.transData.transform((each.p50_us, each.bytes))
    left, right = (axes.transData.transform((edge, each.bytes))[0] for edge in (low, high))
    return [
        Bbox.from_extents(x - 8 * scale, y - 8 * scale, x + 8 * scale, y + 8 * scale),
        Bbox.from_extents(left, y - scale, right, y + scale),
    ]


def _bar(each: CandidateRecord) -> tuple[float, float]:
    """Returns the ends of the error bar; ends that can't be drawn fall back to the median."""
    low, high = each.p50_min_us, each.p50_max_us
    return (
        low if drawable(low) and low > 0 else each.p50_us,
        high if drawable(high) and high > 0 else each.p50_us,
    )


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _within(inner: Bbox, outer: Bbox) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0 <= inner.y1 <= outer.y1
    )
