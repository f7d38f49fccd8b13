"""The plot of a metric by client, with the clients' names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fedcore.observability.words import figure
from server.records import ClientRecord
from server.report.axes import metric_label, plain_numbers
from server.report.svg import BLUE, FAINT, HEIGHT_IN, MUTED, draw, drawable, shortened


def clients_plot(
    clients: Sequence[ClientRecord], *, primary: str, higher_is_better: bool
) -> str | None:
    """Plots each client's metric: sorted on the left, against its examples on the right."""
    shown = sorted((c for c in clients if drawable(c.metric)), key=lambda c: c.metric)
    if not shown:
        return None
    spent = [c.epsilon if drawable(c.epsilon) else math.nan for c in shown]
    most = max((c.epsilon for c in shown if c.epsilon is not None), default=math.nan)
    coloured = drawable(most)

    # Eight steps: a smooth colour bar would be an embedded image, which the content policy forbids.
    colours = colormaps["viridis_r"].resampled(8).with_extremes(bad=FAINT)

    def paint(on: Figure) -> None:
        ordered, against = on.subplots(1, 2, sharey=True)
        metrics = [c.metric for c in shown]
        size = 34 if len(shown) <= 60 else 14
        for axes, places in (
            (ordered, list(range(1, len(shown) + 1))),
            (against, [max(1, c.examples) for c in shown]),
        ):
            dots = axes.scatter(
                places,
                metrics,
                s=size,
                c=spent if coloured else BLUE,
                cmap=colours if coloured else None,
                vmin=0 if coloured else None,  # one scale for both panels, from 0
                vmax=most if coloured and most > 0 else None,
                plotnonfinite=coloured,
                edgecolors=MUTED,
                linewidths=0.4,
            )
        median = statistics.median(metrics)
        ordered.axhline(median, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        ordered.annotate(
            f"median {figure(median)}",
            (0.02, median),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=MUTED,
            fontsize=8.5,
        )
        plain_numbers(ordered, "y")
        metric_label(ordered, "y", primary, higher_is_better)
        _name_clients(ordered, [c.client for c in shown])
        against.set_xlabel("examples (log)")
        against.set_xscale("log")
        against.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        against.xaxis.set_minor_locator(NullLocator())
        plain_numbers(against, "x")
        if coloured:
            on.colorbar(dots, ax=against, label="epsilon spent", aspect=30)

    named = len(shown) <= _MAX_NAMED
    return draw("clients", f"{primary} of each client", paint, (1.35 if named else 1) * HEIGHT_IN)


_MAX_NAMED = 20  # clients whose names fit below an axis


def _name_clients(axes: Axes, names: Sequence[str]) -> None:
    """Names the clients on the axis that orders them: all of a few, else the ends and middle."""
    count = len(names)
    places = list(range(count))
    if count > _MAX_NAMED:
        places = sorted({round(step * (count - 1) / 6) for step in range(7)})
    axes.set_xticks(
        [place + 1 for place in places],
        [shortened(names[place], 16) for place in places],
        rotation=90 if count > 6 else 45,
        fontsize=8,
    )
    axes.set_xlabel("clients, in order" if count <= _MAX_NAMED else "clients, in order; some named")
