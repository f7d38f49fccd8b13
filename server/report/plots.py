"""The plots of a report, each a function from records to the text of an ``<svg>`` element.

A function returns None if there is nothing to plot; for example, a run without privacy has no
epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedcore.observability.words import bytes_text, figure
from server.records import RoundRecord
from server.report.axes import metric_label, plain_numbers, round_axis
from server.report.summary import MODELS
from server.report.svg import (
    BLUE,
    GREEN,
    HEIGHT_IN,
    MUTED,
    ORANGE,
    PURPLE,
    draw,
    drawable,
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
