"""The figures of a benchmark as one picture."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from fedcore.files import write_atomic

Panel = tuple[str, str, float, str]
"""A metric, its label, what it is divided by, and the scale."""
_PANELS: tuple[Panel, ...] = (
    ("seconds_per_round", "seconds a round", 1.0, "log"),
    ("peak_bytes", "peak memory, MB", 1e6, "linear"),
)
_FEWEST = 4  # places for bars in a panel: one bar alone is not a wall
_OURS, _LIMIT, _OTHER = "#1b6e4b", "#b8b8b8", "#5b7fa6"
_COLOURS = {"fedcore": _OURS, "roofline": _LIMIT}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG: medians as bars with their ranges; times on a log scale, memory from zero."""
    drawn = [row for row in rows if row["metric"] in {panel[0] for panel in _PANELS}]
    workloads = list(dict.fromkeys(str(row["workload"]) for row in drawn))
    figure = Figure(figsize=(2.9 * len(workloads) + 0.6, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(_PANELS), len(workloads), squeeze=False)
    for across, workload in enumerate(workloads):
        for down, (metric, label, unit, scale) in enumerate(_PANELS):
            mine = [row for row in rows if (row["workload"], row["metric"]) == (workload, metric)]
            _panel(axes[down][across], mine, unit, scale)
            if across == 0:
                axes[down][across].set_ylabel(label)
        axes[0][across].set_title(workload)
    _write(figure, path)


def plot_in_a_row(
    rows: Sequence[Mapping[str, Any]], path: Path, *, panels: Sequence[Panel]
) -> None:
    """Writes a PNG as `plot` does, with the panels side by side, and none where there are no rows.

    For workloads that have few metrics in common.
    """
    found = [
        (workload, panel, mine)
        for workload in dict.fromkeys(str(row["workload"]) for row in rows)
        for panel in panels
        if (
            mine := [
                row for row in rows if (row["workload"], row["metric"]) == (workload, panel[0])
            ]
        )
    ]
    if not found:
        return
    figure = Figure(figsize=(2.9 * len(found) + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for across, (workload, (_, label, unit, scale), mine) in enumerate(found):
        _panel(axes[across], mine, unit, scale)
        axes[across].set_ylabel(label)
        axes[across].set_title(workload)
    _write(figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], path: Path, across: str, up: str
) -> None:
    """Writes a PNG: for each curve medians by a positive number, with their ranges as bands."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        places = [place for place, _ in points]
        medians = [statistics.median(values) for _, values in points]
        (line,) = axes.plot(places, medians, marker="o", markersize=4, label=name)
        low, high = ([pick(values) for _, values in points] for pick in (min, max))
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], unit: float, scale: str) -> None:
    if not rows:
        axes.axis("off")
        return
    systems = [str(row["system"]) for row in rows]
    medians = [row["median"] / unit for row in rows]
    spread = [
        [(row["median"] - row["min"]) / unit for row in rows],
        [(row["max"] - row["median"]) / unit for row in rows],
    ]
    bars = axes.bar(
        systems,
        medians,
        yerr=spread,
        capsize=3,
        color=[_COLOURS.get(system, _OTHER) for system in systems],
    )
    labels = [f"{median:.3g}" if median < 1000 else f"{median:.0f}" for median in medians]
    axes.bar_label(bars, labels=labels, fontsize=8, padding=2)
    axes.set_yscale(scale)
    if scale == "log":  # whole decades: a bar's foot means nothing on a log scale
        low, high = min(row["min"] for row in rows), max(row["max"] for row in rows)
        decades = math.floor(math.log10(low / unit)), math.ceil(math.log10(1.5 * high / unit))
        axes.set_ylim(10.0 ** decades[0], 10.0 ** decades[1])
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.margins(y=0.15)
    axes.set_xlim(-0.6, max(len(rows), _FEWEST) - 0.4)
    axes.tick_params(axis="x", rotation=45)
    axes.spines[["top", "right"]].set_visible(False)
