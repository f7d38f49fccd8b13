"""The plots of a report, each a function from records to the text of an ``<svg>`` element.

A function returns None if there is nothing to plot; for example, a run without privacy has no
epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from fedcore.observability.words import bytes_text, figure
from server.records import CandidateRecord, RoundRecord
from server.report.axes import metric_label, plain_numbers, round_axis
from server.report.summary import MODELS
from server.report.svg import (
    BLUE,
    GREEN,
    HEIGHT_IN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    draw,
    drawable,
    shortened,
)


def rounds_plot(
    rounds: Sequence[RoundRecord], *, primary: str, higher_is_better: bool, best_round: int
) -> str | None:
    """Plots the primary metric above epsilon, by round, and marks the best round."""
    values = [(r.round, r.metrics.get(primary)) for r in rounds]
    metric = [(number, value) for number, value in values if value is not None and drawable(value)]
    of_clients = all(r.epsilon_max is None for r in rounds)
    spent = [(r.round, r.client_epsilon if of_clients else r.epsilon_max) for r in rounds]
    epsilon = [(number, value) for number, value in spent if value is not None]
    epsilon = [point for point in epsilon if drawable(point[1])]
    panels = [points for points in (metric, epsilon) if points]
    if not panels:
        return None

    def paint(on: Figure) -> None:
        axes = on.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, points in zip(axes, panels, strict=True):
            marker = "o" if len(points) <= 40 else ""
            colour = BLUE if points is metric else PURPLE
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4)
            panel.margins(x=0.04, y=0.12)
            plain_numbers(panel, "y")
        if metric:
            metric_label(axes[0], "y", primary, higher_is_better)
            _mark_best(axes[0], dict(metric), best_round)
        if epsilon:
            axes[-1].set_ylabel(f"epsilon spent ({'of clients' if of_clients else 'max'})")
            axes[-1].set_ylim(bottom=0)
        round_axis(axes[-1], rounds)

    label = f"{primary} by round" + (", and epsilon spent" if epsilon else "")
    return draw("rounds", label, paint, HEIGHT_IN if len(panels) == 1 else 1.35 * HEIGHT_IN)


def _mark_best(axes: Axes, points: Mapping[int, float], best_round: int) -> None:
    if best_round not in points:
        return
    value = points[best_round]
    axes.plot([best_round], [value], "o", color=ORANGE, markersize=9, fillstyle="none", mew=2)
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    below, late = value > (low + high) / 2, best_round > (left + right) / 2
    axes.annotate(
        f"best: round {best_round}, {figure(value)}",
        (best_round, value),
        xytext=(6 if late else -6, -12 if below else 12),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if below else "bottom",
        color=ORANGE,
    )


def loss_plot(rounds: Sequence[RoundRecord]) -> str | None:
    """Plots the mean training loss by round."""
    values = [(r.round, r.train_loss) for r in rounds]
    points = [(number, loss) for number, loss in values if loss is not None and drawable(loss)]
    if not points:
        return None

    def paint(on: Figure) -> None:
        axes = on.subplots()
        marker = "o" if len(points) <= 40 else ""
        axes.plot(*zip(*points, strict=True), color=GREEN, marker=marker, markersize=4)
        axes.margins(x=0.04, y=0.12)
        plain_numbers(axes, "y")
        axes.set_ylabel("training loss")
        round_axis(axes, rounds)

    return draw("loss", "Training loss by round", paint, HEIGHT_IN)


def bytes_plot(rounds: Sequence[RoundRecord]) -> str | None:
    """Plots cumulative bytes by round, up to the server and down to clients."""
    if not any(r.bytes_up or r.bytes_down for r in rounds):
        return None
    numbers = [r.round for r in rounds]
    up = list(accumulate(r.bytes_up for r in rounds))
    down = list(accumulate(r.bytes_down for r in rounds))

    def paint(on: Figure) -> None:
        axes = on.subplots()
        top = max(up[-1], down[-1])
        close = abs(up[-1] - down[-1]) < 0.1 * top  # labels on one height would overlap
        for sent, way, colour, dashes in (
            (up, "up", BLUE, "-"),
            (down, "down", GREEN, (0, (4, 2))),
        ):
            axes.plot(numbers, sent, color=colour, linestyle=dashes, marker="o", markersize=3)
            higher = sent[-1] == top if up[-1] != down[-1] else way == "up"
            axes.annotate(
                f"{way} {bytes_text(sent[-1])}",
                (numbers[-1], sent[-1]),
                xytext=(8, (8 if higher else -8) if close else 0),
                textcoords="offset points",
                va="center",
                color=colour,
                annotation_clip=False,
            )
        axes.set_ylim(0, 1.1 * top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        axes.set_ylabel("bytes sent so far, all clients")
        round_axis(axes, rounds)

    return draw("bytes", "Bytes sent by round, up and down", paint, HEIGHT_IN)


def candidates_plot(
    candidates: Sequence[CandidateRecord],
    *,
    primary: str,
    higher_is_better: bool,
    chosen: str | None,
) -> str | None:
    """Plots each candidate's metric against p50 latency; marker area grows with file size."""
    shown = [c for c in candidates if drawable(c.metric) and drawable(c.p50_us) and c.p50_us > 1e-6]
    if not shown:
        return None
    largest = max(1, *(c.bytes for c in shown))

    def paint(on: Figure) -> None:
        axes = on.subplots()
        axes.set_xscale("log")
        for candidate in shown:
            colour = ORANGE if candidate.name == chosen else BLUE
            axes.plot(_bar(candidate), [candidate.metric] * 2, color=colour, linewidth=1.5)
            axes.scatter(
                [candidate.p50_us],
                [candidate.metric],
                s=40 + 300 * candidate.bytes / largest,
                facecolor=colour if candidate.admitted else "white",
                edgecolor=colour,
                linewidth=1.5,
                alpha=0.9,
                zorder=3,
            )
        _log_times(axes, [c.p50_us for c in shown])
        axes.margins(y=0.25)
        plain_numbers(axes, "y")
        metric_label(axes, "y", primary, higher_is_better)
        axes.set_xlabel("p50 latency, \N{MICRO SIGN}s (bar: medians of repeated blocks)")
        _label_points(on, axes, shown, chosen)

    return draw("candidates", f"Candidates: {primary} against latency", paint, 1.15 * HEIGHT_IN)


def _log_times(axes: Axes, times_us: Sequence[float]) -> None:
    """Sets limits that span at least a factor of six, and ticks such as 10, 20, 50."""
    middle = math.sqrt(min(times_us)) * math.sqrt(max(times_us))
    reach = max(math.sqrt(6), 1.6 * math.sqrt(max(times_us) / min(times_us)))
    axes.set_xlim(middle / reach, middle * reach)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    plain_numbers(axes, "x")


def _label_points(
    on: Figure, axes: Axes, shown: Sequence[CandidateRecord], chosen: str | None
) -> None:
    """Labels the points, each at the nearest position where the label overlaps least."""
    on.draw_without_rendering()  # computes the layout that label positions depend on
    scale = on.dpi / 72  # pixels per point
    frame = axes.get_window_extent()
    taken = [box for c in shown for box in _marks(axes, c, scale)]
    for candidate in sorted(shown, key=lambda c: c.name != chosen):
        text = _label(candidate, chosen)
        measured = axes.text(0, 0, text, fontsize=_LABEL_PT)
        extent = measured.get_window_extent()
        measured.remove()
        centre = axes.transData.transform((candidate.p50_us, candidate.metric))
        boxes = [_box(centre, (extent.width, extent.height), place, scale) for place in _PLACES]
        covered = [box.count_overlaps(taken) + (not _within(box, frame)) for box in boxes]
        first = covered.index(min(covered))
        taken.append(boxes[first])
        dx, dy = _PLACES[first]
        label = axes.annotate(
            text,
            (candidate.p50_us, candidate.metric),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=_SIDES[_sign(dx)],
            va=_LEVELS[_sign(dy)],
            fontsize=_LABEL_PT,
            color=ORANGE if candidate.name == chosen else INK if candidate.admitted else MUTED,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 5},
        )
        label.set_in_layout(False)


def _label(candidate: CandidateRecord, chosen: str | None) -> str:
    text = f"{shortened(candidate.name, 24)}, {bytes_text(candidate.bytes)}"
    if candidate.name == chosen:
        return f"{text}\nchosen"
    if candidate.admitted:
        return text
    return f"{text}\nrefused: {shortened(candidate.reason.removeprefix('refused: '), 30)}"


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


def _marks(axes: Axes, candidate: CandidateRecord, scale: float) -> list[Bbox]:
    """Returns the boxes in pixels of a candidate's marker and error bar."""
    low, high = _bar(candidate)
    x, y = axes.transData.transform((candidate.p50_us, candidate.metric))
    left, right = (axes.transData.transform((edge, candidate.metric))[0] for edge in (low, high))
    return [
        Bbox.from_extents(x - 8 * scale, y - 8 * scale, x + 8 * scale, y + 8 * scale),
        Bbox.from_extents(left, y - scale, right, y + scale),
    ]


def _bar(candidate: CandidateRecord) -> tuple[float, float]:
    """Returns the ends of the error bar; ends that can't be drawn fall back to the median."""
    low, high = candidate.p50_min_us, candidate.p50_max_us
    return (
        low if drawable(low) and low > 0 else candidate.p50_us,
        high if drawable(high) and high > 0 else candidate.p50_us,
    )


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _within(inner: Bbox, outer: Bbox) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0 <= inner.y1 <= outer.y1
    )


def scores_plot(scores: Mapping[str, float], *, primary: str, higher_is_better: bool) -> str | None:
    """Plots the primary metric of each model on the final test split, as bars."""
    shown = [(name, scores[name]) for name in MODELS if drawable(scores.get(name))]
    if not shown:
        return None

    def paint(on: Figure) -> None:
        axes = on.subplots()
        names = [MODELS[name] for name, _ in shown]
        colours = [ORANGE if name == "released" else BLUE for name, _ in shown]
        bars = axes.barh(names, [value for _, value in shown], color=colours, height=0.6)
        axes.bar_label(bars, [figure(value) for _, value in shown], padding=4)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.14)
        axes.axvline(0, color=MUTED, linewidth=1)
        plain_numbers(axes, "x")
        metric_label(axes, "x", primary, higher_is_better)

    return draw("scores", f"{primary} on the final test split", paint, 0.8 * HEIGHT_IN)
