"""Axes that several plots of a report share."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.records import RoundRecord
from server.report.svg import shortened

_NAME_LENGTH = 24  # characters of a metric's name that fit next to an axis


def metric_label(axes: Axes, which: str, primary: str, higher_is_better: bool) -> None:
    """Names a metric on axis ``x`` or ``y``, and says which way is better."""
    better = "higher" if higher_is_better else "lower"
    text = f"{shortened(primary, _NAME_LENGTH)} ({better} is better)"
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(text)


def plain_numbers(axes: Axes, which: str) -> None:
    """Writes the numbers on axis ``x`` or ``y`` without a common factor."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def round_axis(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    """Makes the horizontal axis one of whole rounds."""
    axes.set_xlabel("round")
    if len(rounds) > 1:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axes.set_xticks([rounds[0].round])
